# SPDX-License-Identifier: Apache-2.0
"""The commands of `deepspeed_ds4sci.checkpoint`."""

import argparse
import json
import sys
from pathlib import Path

from deepspeed_ds4sci.checkpoint import __doc__ as about
from deepspeed_ds4sci.checkpoint.export import export
from deepspeed_ds4sci.checkpoint.universal import to_universal
from deepspeed_ds4sci.models.configs import NAMED_CONFIGS, GenSLMConfig


def genslm_config(text: str) -> GenSLMConfig:
    """A published name, or a JSON file with the fields of GenSLMConfig.

    Raises:
        ValueError: neither, or fields that do not fit.
    """
    if text in NAMED_CONFIGS:
        return NAMED_CONFIGS[text]
    try:
        return GenSLMConfig(**json.loads(Path(text).read_text()))
    except OSError as error:
        raise ValueError(f"--genslm must be a published name or a JSON file, got {text!r}") from error
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{text} must hold the fields of GenSLMConfig: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m deepspeed_ds4sci.checkpoint",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export", help="one state dict of the whole model, fp32")
    exporting.add_argument("directory", help="what was passed to save_checkpoint")
    exporting.add_argument("out", help="file; safetensors if it ends so, else torch's format")
    exporting.add_argument("--tag", help="of the checkpoint; default: the latest")
    exporting.add_argument("--genslm", help="the model is a GenSLM of this name or JSON file: Hugging Face's names")
    converting = commands.add_parser("universal", help="for another ZeRO stage or number of ranks")
    converting.add_argument("folder", help="DIR/TAG")
    converting.add_argument("out", nargs="?", help="default: DIR/TAG_universal")
    options = parser.parse_args(arguments)
    try:
        if options.command == "universal":
            print(f"wrote {to_universal(options.folder, options.out)}")
            return 0
        config = None if options.genslm is None else genslm_config(options.genslm)
        state = export(options.directory, options.out, options.tag, config)
    except (ValueError, NotImplementedError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    numbers = sum(tensor.numel() for tensor in state.values())
    print(f"wrote {len(state)} tensors with {numbers} numbers to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

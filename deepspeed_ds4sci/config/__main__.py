# SPDX-License-Identifier: Apache-2.0
"""`python -m deepspeed_ds4sci.config check FILE`: validates a DeepSpeed config with a `ds4sci` block, explains it."""

import argparse
import sys

from deepspeed_ds4sci.config import BLOCK, check_combinations, load_file, read_block
from deepspeed_ds4sci.config.explain import explain


def main(arguments=None) -> int:
    """Returns the exit code: 0 valid, 1 refused (the reason is on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m deepspeed_ds4sci.config", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="validate a file and explain it in plain words")
    check.add_argument("file", help="a DeepSpeed config in JSON")
    options = parser.parse_args(arguments)
    try:
        ds_config = load_file(options.file)
        config = read_block(ds_config)
        if config is None:
            print(f"{options.file}: no {BLOCK} block; DeepSpeed runs as it is")
            return 0
        check_combinations(config, ds_config)
    except (ValueError, NotImplementedError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 1
    print(f"{options.file}: valid")
    print("\n".join(explain(config, ds_config)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

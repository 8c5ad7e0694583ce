# SPDX-License-Identifier: Apache-2.0
"""Training under an explicit mask, built on the device and in CPU memory: `python -m tests.benchmarks.explicit_mask`.

For each length both sides of the threshold of `ds4sci.attention_mask`: the time of building the mask and the device
memory that building takes above what is there, mask included, then the same of a step (mask, forward, backward) of a
GenSLM-style decoder. Out of memory is a result. `--reserve-gib` takes up memory first, as weights and optimizer
states of a larger model would.
"""

import argparse
import gc
import json
import shlex
import sys
from pathlib import Path

import torch

from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.sequence.masks import MaskFactory
from tests.benchmarks.record import machine, machine_line
from tests.benchmarks.table import aligned
from tests.benchmarks.timing import clock_for
from tests.unit.hooks.apply import with_hooks

LENGTHS = (4096, 8192, 12288, 16384, 20480, 24576, 32768)
COLUMNS = ("tokens", "built", "build ms", "build MiB", "step ms", "step MiB")


def measure(device, lengths, implementation, size, min_ms):
    """One dict per length and side, with the keys of COLUMNS; numbers are None where there is nothing to ask, or a
    string that says why there is none."""
    clock = clock_for(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = GenSLM(GenSLMConfig(size, 2, 8, 4 * size, max(lengths))).to(device, dtype)
    for seq_len in lengths:
        tokens = torch.randint(5, 69, (1, seq_len), device=device)
        documents = torch.arange(seq_len, device=device).div(seq_len // 3, rounding_mode="floor")[None]
        batch = {"input_ids": tokens, "labels": tokens, "document_ids": documents}
        for side, threshold in (("device", seq_len), ("CPU", seq_len - 1)):
            factory = MaskFactory(device, threshold)
            model, *_ = with_hooks(
                plain,
                attention_mask={"kind": "document", "cpu_threshold": threshold},
                attention={"implementation": implementation},
            )
            build = _tried(clock, lambda f=factory, n=seq_len, d=documents: f(n, document_ids=d), min_ms)
            step = _tried(clock, lambda m=model, b=batch: m(**b).loss.backward(), min_ms)
            yield dict(zip(COLUMNS, (seq_len, side, *build, *step), strict=True))
            del model


def _tried(clock, run, min_ms):
    """(milliseconds, extra MiB), or twice "OOM"."""
    try:
        run()  # gradients and compiled kernels are not counted
        return clock.time(run, min_ms).median, clock.extra_memory(run)
    except torch.OutOfMemoryError:
        return "OOM", "OOM"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _shown(value):
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--implementation", default="efficient" if on_gpu else "math")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the two layers")
    parser.add_argument("--reserve-gib", type=float, default=0.0, help="device memory to take up first")
    parser.add_argument("--min-ms", type=float, default=50.0, help="time to measure each thing for")
    parser.add_argument("--json", type=Path, help="file for the record")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    reserved = torch.empty(int(options.reserve_gib * 2**30), dtype=torch.uint8, device=device)
    given = sys.argv[1:] if arguments is None else arguments
    about = {**machine(device, []), "command": f"python -m tests.benchmarks.explicit_mask {shlex.join(given)}"}
    rows = list(measure(device, options.lengths, options.implementation, options.hidden, options.min_ms))
    del reserved
    print(aligned([list(COLUMNS), *([_shown(row[name]) for name in COLUMNS] for row in rows)]))
    print(machine_line(about))
    if options.json is not None:
        settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({"machine": about, "settings": settings, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

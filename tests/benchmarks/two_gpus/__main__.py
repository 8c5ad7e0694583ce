# SPDX-License-Identifier: Apache-2.0
"""The command; see the package's docstring."""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import torch

from tests.benchmarks.record import machine
from tests.benchmarks.two_gpus import __doc__ as about
from tests.benchmarks.two_gpus.parts import PARTS, Ranks
from tests.benchmarks.two_gpus.report import draw, succeeded, text
from tests.benchmarks.two_gpus.sizes import FULL, TINY


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.two_gpus",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    parser.add_argument("--tiny", action="store_true", help="two CPU ranks and small sizes")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; default: all")
    parser.add_argument("--timeout", type=int, default=150, help="seconds for one launch of ranks")
    parser.add_argument("--redraw", type=Path, metavar="RECORD", help="print and plot a record; nothing runs")
    options = parser.parse_args(arguments)
    if options.redraw:
        return _show(json.loads(options.redraw.read_text()), options.plot)
    chosen = options.parts.split(",")
    if not set(chosen) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}; got {options.parts}")
    if not options.tiny and torch.cuda.device_count() < 2:
        parser.error(f"needs two GPUs, torch sees {torch.cuda.device_count()}; --tiny runs on CPU ranks")
    ranks = Ranks("gloo" if options.tiny else "nccl", options.timeout)
    device = torch.device("cpu" if options.tiny else "cuda")
    about_machine = machine(device, arguments)
    about_machine["command"] = about_machine["command"].replace("tests.benchmarks ", "tests.benchmarks.two_gpus ", 1)
    record = {"machine": about_machine, "parts": {}, "seconds": {}}
    for name in chosen:
        started = time.monotonic()
        try:
            record["parts"][name] = PARTS[name](ranks, TINY if options.tiny else FULL)
        except Exception:  # the other parts may still come out
            record["parts"][name] = {"error": traceback.format_exc()}
        record["seconds"][name] = time.monotonic() - started
        print(f"{name}: {record['seconds'][name]:.0f} s", flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    return _show(record, options.plot)


def _show(record, plot):
    print(text(record))
    if plot:
        draw(record, plot)
    return 0 if succeeded(record) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

# SPDX-License-Identifier: Apache-2.0
"""TFLOP/s and MFU by length, 2K to 256K tokens, with the memory options off and on; tokens/s by batch size.

    python -m tests.benchmarks.throughput_by_length --json out.json --plot out.png --budget-seconds 400
    python -m tests.benchmarks.throughput_by_length --variants keep,off --lengths 8192,131072
    python -m tests.benchmarks.throughput_by_length --redraw a.json,b.json --plot lengths.png
    python -m tests.benchmarks.throughput_by_length --tiny

The first table of DeepSpeed4Science's long-sequence method in kind, for the 2.5B decoder on one GPU or two, ZeRO off
where states fit. Each variant is one DeepSpeed JSON; its lengths run in turn in one process until memory ends. Figures
are complete training steps; TFLOP/s are per GPU in two counts, see `deepspeed_ds4sci.training.flops`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.long_sequence import report
from tests.benchmarks.long_sequence.launch import START_SECONDS, longest_repeated, run_cases
from tests.benchmarks.long_sequence.models import counted_config, job_of
from tests.benchmarks.long_sequence.rungs import ATTENTION, Rung, with_attention
from tests.benchmarks.record import machine_line
from tests.benchmarks.table import aligned

MODULE = "tests.benchmarks.throughput_by_length"

_FUSED = {"attention": {"implementation": "fastest"}}
_TILES = {"tiling": {"mlp": 16384, "loss": 16384}}
_FULL = {"activation_checkpointing": {"kind": "full"}}
_KEPT = {"activation_checkpointing": {"kind": "keep_attention"}, "tiling": {"loss": 16384}}
_HOST = {"activation_checkpointing": {"kind": "full", "cpu_offload": True}}
_TWO = {"sequence_parallel": {"size": 2, "mode": "ulysses"}}

# guess is not used here. In the order of their worth: a run that is cut off has the first ones.
VARIANTS = {
    rung.name: rung
    for rung in (
        Rung("off", "flash", "memory options off", 0, _FUSED, zero=False),
        Rung("keep", "flash", "recomputed but for attention, tiled loss", 0, _FUSED | _KEPT, zero=False),
        Rung("on", "flash", "recomputed, tiled", 0, _FUSED | _FULL | _TILES, zero=False),
        Rung(
            "host",
            "flash",
            "recomputed, tiled, checkpoints and optimizer in CPU memory",
            0,
            _FUSED | _HOST | _TILES,
            offload_optimizer=True,
        ),
        Rung("off-2", "flash", "2 GPUs, memory options off", 0, _FUSED | _TWO, zero=False, gpus=2),
        Rung("on-2", "flash", "2 GPUs, recomputed, tiled", 0, _FUSED | _FULL | _TILES | _TWO, zero=False, gpus=2),
    )
}
LENGTHS = [2048 << i for i in range(8)]
BATCHES = [(size, length) for length in (2048, 8192) for size in (1, 2, 4, 8, 16, 32)]
BATCHED = ("off", "on")
"""Variants whose speed by batch size is measured."""


def measure(variant: Rung, cases: list[tuple[int, int]], options, deadline: float, peak: float) -> list[dict]:
    """The cases in turn until one fails or time ends."""
    left = deadline - time.monotonic()
    if left < 1 or not cases:
        return []
    job = job_of(
        variant,
        cases,
        tiny=options.tiny,
        compute_layers=None,
        steps=options.steps,
        repeat_under=options.repeat_under,
        device_gib=options.device_gib,
    )
    found = run_cases(
        job,
        ranks=variant.gpus,
        seconds=min(left, START_SECONDS + options.case_seconds * len(cases)),
        tiny=options.tiny,
        case_seconds=options.case_seconds,
    )
    if time.monotonic() >= deadline:  # its end says nothing about the case that it cuts off
        found = [case for case in found if case["status"] != "time"]
    config = counted_config(variant, options.tiny, None)
    rated = [report.with_rates(case, config, variant.gpus, peak) for case in found]
    for case in rated:
        case.pop("event")
        cells = dict(zip(report.HEADS, report.cells(case), strict=True))
        print(
            f"  {case['batch_size']} x {case['length']:,}: " + ", ".join(f"{k} {v}" for k, v in cells.items()),
            flush=True,
        )
        if "failure" in case:
            print(case["failure"], flush=True)
    return rated


def table(record: dict) -> str:
    """One line per variant, length and batch size."""
    rows = [["variant", "what", "GPUs", "sequences", "tokens each", *report.HEADS]]
    for variant in record["variants"]:
        for case in (*variant["cases"], *variant["batches"]):
            shape = [str(case["batch_size"]), f"{case['length']:,}"]
            rows.append([variant["name"], variant["says"], str(variant["gpus"]), *shape, *report.cells(case)])
    return aligned(rows)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--variants", help=f"separated by commas, of {', '.join(VARIANTS)}; default: all that the GPUs allow")
    add("--lengths", help="tokens, ascending, separated by commas; default: 2048 to 262144 by doubling")
    add("--attention", choices=ATTENTION, help='in place of "fastest"')
    add("--no-batches", action="store_true", help="leave out the batch sizes")
    add("--budget-seconds", type=float, default=3600, help="for the whole run; it then writes what it has")
    add("--case-seconds", type=float, default=200, help="for one case; longer ends the variant")
    add("--steps", type=int, default=3, help="per case; the last is timed")
    add("--repeat-under", type=float, help="a step of more seconds is timed as it is; default: by --case-seconds")
    add("--device-gib", type=float, help="use no more of each GPU, as if it were a smaller one, such as 79.2")
    add("--json", type=Path, help="where the record goes")
    add("--plot", type=Path, help="where the picture goes")
    add("--redraw", help="records, separated by commas: their variants as one plot, nothing is run")
    add("--tiny", action="store_true", help="rehearsal on CPU ranks with a model of 200,000 parameters")
    options = parser.parse_args(argv)
    if options.redraw:
        if not options.plot:
            parser.error("--redraw needs --plot")
        return options
    if options.repeat_under is None:
        options.repeat_under = longest_repeated(options.case_seconds, options.steps)
    gpus = 2 if options.tiny else torch.cuda.device_count()
    if not gpus:
        parser.error("no GPU was found; --tiny rehearses on CPU ranks")
    allowed = [name for name, variant in VARIANTS.items() if variant.gpus <= gpus]
    names = options.variants.split(",") if options.variants else allowed
    for name in names:
        if name not in allowed:
            parser.error(f"--variants must be of {', '.join(allowed)} on {gpus} GPU(s), got {name!r}")
    options.variants = [VARIANTS[name] for name in names]
    if options.attention:
        try:
            options.variants = [with_attention(variant, options.attention) for variant in options.variants]
        except NotImplementedError as error:
            parser.error(str(error))
    default = [64, 128] if options.tiny else LENGTHS
    options.lengths = [int(length) for length in options.lengths.split(",")] if options.lengths else default
    options.batches = [] if options.no_batches else [(1, 64), (2, 64)] if options.tiny else BATCHES
    return options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse_arguments(argv)
    if options.redraw:
        records = [json.loads(Path(path).read_text()) for path in options.redraw.split(",")]
        report.draw_lengths(report.variants_together(records), options.plot)
        return 0
    deadline = time.monotonic() + options.budget_seconds
    record = {"machine": report.about(MODULE, argv), "tiny": options.tiny, "variants": []}
    peak = record["machine"]["peak_flops"]

    def save():
        if options.json:
            report.write(options.json, record)

    for variant in options.variants:
        print(f"{variant.name}: {variant.says}", flush=True)
        cases = measure(variant, [(1, length) for length in options.lengths], options, deadline, peak)
        config = variant.ds_config(options.tiny)
        entry = {"name": variant.name, "says": variant.says, "gpus": variant.gpus, "ds_config": config}
        record["variants"].append(entry | {"cases": cases, "batches": []})
        save()
    for variant, entry in zip(options.variants, record["variants"], strict=True):
        if variant.name not in BATCHED:
            continue
        for length in dict.fromkeys(length for _, length in options.batches):  # a new process after memory has ended
            cases = [case for case in options.batches if case[1] == length]
            entry["batches"] += measure(variant, cases, options, deadline, peak)
            save()
    print(f"\n{machine_line(record['machine'])}\n{table(record)}")
    if options.plot:
        report.draw_lengths(record, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

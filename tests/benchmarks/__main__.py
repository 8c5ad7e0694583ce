# SPDX-License-Identifier: Apache-2.0
"""`make bench`: time and memory of the op beside every peer that is installed, in one process.

    python -m tests.benchmarks                                       # the shapes with timing bars, every peer
    python -m tests.benchmarks --shapes triangle-512,msa-row --peers flex,deepspeed
    python -m tests.benchmarks --shapes uses --impl default,sm80,sm90
    python -m tests.benchmarks --gate                                # the output's gate in the op, and apart from it
    python -m tests.benchmarks --shapes lengths,tails --passes fwd --mask none --json out.json --plot out.png
    python -m tests.benchmarks --device cpu --quick

Times are medians of device events over at least --min-ms of repetitions after warm-up, the L2 cache flushed before
each. Every implementation must first agree with an fp64 reference on a part of the problem. A peer without a time is a
missing result, not a win; the reasons stand below the table.
"""

import argparse
import fnmatch
import sys
from pathlib import Path

import torch

from tests.benchmarks import plot, record, table
from tests.benchmarks.case import DTYPES, Case
from tests.benchmarks.measure import PASSES, Bench, Result, Settings
from tests.benchmarks.peers import PEERS, Ours, Peer
from tests.benchmarks.timing import clock_for
from tests.helpers import shapes as named

GROUPS = {
    "bars": named.BARS,
    "uses": named.USES,
    "lengths": named.LENGTHS,
    "tails": named.TAILS,
    "small": named.SMALL_USES,
}
QUICK = {"cuda": "triangle-256,msa-row-initial", "cpu": "small-triangle"}
SMALL_LOGITS = 2**27  # launches, not the GPU, decide the time of smaller eager calls: triangle 256 is half of it


def chosen_shapes(text: str) -> list[named.AttentionShape]:
    """Shapes by name, group or pattern, in the order given; ValueError for a word that names none."""
    known = {shape.name: shape for group in GROUPS.values() for shape in group}
    chosen = {}
    for word in text.split(","):
        found = GROUPS.get(word) or [known[name] for name in known if fnmatch.fnmatchcase(name, word)]
        if not found:
            raise ValueError(f"--shapes takes {', '.join([*GROUPS, *known])} or patterns of these names; got {word!r}")
        chosen.update((shape.name, shape) for shape in found)
    return list(chosen.values())


def chosen_peers(text: str, default: list[str]) -> list[Peer]:
    """Peers by name; "all" is the default list, "none" the empty one; ValueError for an unknown name."""
    if text in ("all", "none"):
        return [PEERS[name] for name in default if text == "all"]
    for name in text.split(","):
        if name not in PEERS:
            raise ValueError(f"--peers takes {', '.join(PEERS)}, all or none; got {name!r}")
    return [PEERS[name] for name in text.split(",")]


def chosen_passes(text: str) -> tuple[str, ...]:
    passes = tuple(text.split(","))
    if not set(passes) <= set(PASSES):
        raise ValueError(f"--passes takes {', '.join(PASSES)}; got {text!r}")
    return passes


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--shapes", help=f"names, patterns (triangle-*) or the groups {', '.join(GROUPS)}, with commas")
    add("--impl", default="default", help="ours: names with commas; default (the default) is the one picked by itself")
    add("--peers", default="all", help=f"with commas, of {', '.join(PEERS)}; or all, or none")
    add("--passes", default="fwd,fwd+bwd", help="fwd, fwd+bwd or both (default)")
    add("--dtype", help=f"with commas, of {', '.join(DTYPES)} (default: bf16; on the CPU fp32)")
    add("--mask", choices=("random", "none"), default="random", help="random: a constant mask of 10%% of the keys")
    add("--pair-grad", action=flag, default=True, help="gradient of the pair bias")
    add("--gate", action="store_true", help="ours alone: the output times a sigmoid, fused and apart")
    add("--graph", action="store_true", help="small shapes also as CUDA-graph replay, on lines of their own")
    add("--memory", action=flag, default=True, help="peak memory of each pass")
    add("--min-ms", type=float, help="milliseconds of repetitions (default 200; 20 with --quick)")
    add("--quick", action="store_true", help="one or two shapes, short repetitions")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, metavar="FILE", help="write the record; rewritten after every shape")
    add("--plot", type=Path, metavar="FILE", help="draw time and memory against L")
    return parser.parse_args(arguments)


def log(text: str) -> None:
    """Progress goes to stderr: the tables stay alone on stdout."""
    print(text, file=sys.stderr, flush=True)


def run(cases: list[Case], columns: list[Peer], bench: Bench, done) -> list[Result]:
    """Measures every column on every case; calls `done(results)` after each case."""
    results: list[Result] = []
    for case in cases:
        log(f"{case.name} {case.dtype} ...")
        expected = bench.expect(case)
        for column in columns:
            results += bench.measure(case, column, expected)
            if bench.fatal:
                log(f"stopped: after {column.name} on {case.name} the device answers {bench.fatal}")
                return results
        done(results)
    return results


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    on_cpu = options.device == "cpu"
    default_shapes = QUICK[options.device] if options.quick else "small" if on_cpu else "bars"
    try:
        shapes = chosen_shapes(options.shapes or default_shapes)
        peers = chosen_peers(options.peers, [] if options.gate else ["eager", "sdpa"] if on_cpu else list(PEERS))
        passes = chosen_passes(options.passes)
        dtypes = (options.dtype or ("fp32" if on_cpu else "bf16")).split(",")
        if not set(dtypes) <= set(DTYPES):
            raise ValueError(f"--dtype takes {', '.join(DTYPES)}; got {options.dtype!r}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    settings = Settings(
        passes=passes,
        min_ms=options.min_ms or (20.0 if options.quick else 200.0),
        memory=options.memory and not on_cpu,
        graph_logits=SMALL_LOGITS if options.graph else 0,
    )
    named = [None if name == "default" else name for name in options.impl.split(",")]
    ours = [Ours(name, fuses_gate) for name in named for fuses_gate in ([True, False] if options.gate else [True])]
    variant = (options.mask, options.pair_grad, options.gate)
    cases = [Case.of(shape, dtype, *variant) for dtype in dtypes for shape in shapes]
    about = record.machine(device, arguments)
    bench = Bench(device, clock_for(device), settings)

    def keep(results: list[Result]) -> dict:
        made = record.as_record(about, settings, [column.name for column in ours], results)
        if options.json:
            record.write(options.json, made)
        return made

    results = run(cases, [*ours, *peers], bench, keep)
    made = keep(results)
    report(made, options)
    if options.plot:
        plot.draw(made, options.plot)
    ours_bad = any(r.status in ("WRONG", "failed") for r in results if r.implementation.startswith("ours"))
    return 1 if ours_bad or bench.fatal else 0


def report(made: dict, options: argparse.Namespace) -> None:
    """Prints the machine, the tables, and why figures are missing."""
    flushed = ", L2 flushed" if made["settings"]["l2_flushed"] else ""
    print(f"{record.machine_line(made['machine'])} | medians of >= {made['settings']['min_ms']:g} ms{flushed}")
    gate = "; gate of the output" if options.gate else ""
    print(f"mask {options.mask}, pair-bias gradient {'on' if options.pair_grad else 'off'}{gate}; (x): times ours\n")
    print(table.render(made))
    memory = table.render_memory(made)
    if memory:
        print(f"\npeak memory above the inputs\n{memory}")
    missing = table.reasons(made)
    if missing:
        print("\n" + "\n".join(missing))


if __name__ == "__main__":
    raise SystemExit(main())

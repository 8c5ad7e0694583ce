# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a whole Evoformer block, by who computes its attention, forward and backward, in one process.

    python -m tests.benchmarks.evoformer_block                        # both blocks, every variant, bf16, on a GPU
    python -m tests.benchmarks.evoformer_block --blocks pair-stack --peers eager,flex --json out.json --plot out.png
    python -m tests.benchmarks.evoformer_block --tiny --device cpu    # the program itself, on small blocks

The block is that of `deepspeed_ds4sci.nn` with AlphaFold's widths (c_m 256, c_z 128), dropout off, 10 % of both masks
dropped: `block` on an alignment of 512 x 384, `pair-stack` alone at 768 residues. In eager PyTorch with attention by
`ours` (the op, gate included), `ours-gate-apart` (the op without the gate, which PyTorch applies for all that follow,
too), `eager` (matmul, softmax), `deepspeed` (DeepSpeed's op) and `flex` (FlexAttention, compiled); and compiled as a
whole with `compile` (attention of `eager`), `ours+compile` and `flex+compile`.

Every variant must first agree with an fp32 run of the definition, outputs and gradients. A variant without a time
is a missing result, not a win; the reasons stand below the tables.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from tests.benchmarks import record, table
from tests.benchmarks.__main__ import log
from tests.benchmarks.evoformer_block import report
from tests.benchmarks.evoformer_block.measure import BlockBench, BlockResult
from tests.benchmarks.evoformer_block.problem import CASES, TINY_CASES
from tests.benchmarks.evoformer_block.variants import OURS, VARIANTS
from tests.benchmarks.measure import Settings
from tests.benchmarks.timing import clock_for


def chosen(parser: argparse.ArgumentParser, option: str, text: str, known: dict) -> list:
    """Values of `known` by name, with commas; "all" for all. Ends the program for an unknown name."""
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{option} takes {', '.join(known)} or all; got {name!r}")
    return [known[name] for name in names]


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.evoformer_block",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    peers = {name: variant for name, variant in VARIANTS.items() if name != OURS}
    add("--blocks", default="all", help=f"with commas, of {', '.join(CASES)}; or all")
    add("--peers", default="all", help=f"beside ours, with commas, of {', '.join(peers)}; or all")
    add("--tiny", action="store_true", help="small blocks: a run of the program, not a measurement")
    add("--min-ms", type=float, default=200.0, help="milliseconds of repetitions (default 200)")
    add("--limit-s", type=float, default=60.0, help="seconds for one variant of one block (default 60)")
    add("--total-s", type=float, default=140.0, help="seconds after which variants are skipped (default 140)")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, metavar="FILE", help="write the record; rewritten after every figure")
    add("--plot", type=Path, metavar="FILE", help="draw time and memory as bars")
    options = parser.parse_args(arguments)
    for name in ("min_ms", "limit_s", "total_s"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(options, name):g}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu takes small blocks only, got no --tiny")
    dtype = "fp32" if options.device == "cpu" else "bf16"
    blocks = chosen(parser, "--blocks", options.blocks, TINY_CASES if options.tiny else CASES)
    cases = [dataclasses.replace(case, dtype=dtype) for case in blocks]
    variants = [VARIANTS[OURS], *chosen(parser, "--peers", options.peers, peers)]
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    about = record.machine(device, arguments, module="tests.benchmarks.evoformer_block")
    bench = BlockBench(device, clock_for(device), options.min_ms, options.limit_s, options.total_s)
    settings = Settings(passes=("fwd+bwd",), min_ms=options.min_ms)
    results: list[BlockResult] = []

    def made() -> dict:
        return record.as_record(about, settings, [OURS], results)

    for variant, case in ((variant, case) for variant in variants for case in cases):
        log(f"{case.name}: {variant.name} ...")
        results.append(bench.measure(case, variant))
        if options.json:
            record.write(options.json, made())
        if bench.fatal:
            log(f"stopped: after {variant.name} on {case.name} the device answers {bench.fatal}")
            break
    print_tables(made())
    if options.plot:
        report.draw(made(), options.plot)
    ours_bad = any(r.status in ("WRONG", "failed") for r in results if r.implementation == OURS)
    return 1 if ours_bad or bench.fatal else 0


def print_tables(made: dict) -> None:
    flushed = ", L2 flushed" if made["settings"]["l2_flushed"] else ""
    print(f"{record.machine_line(made['machine'])} | medians of >= {made['settings']['min_ms']:g} ms{flushed}\n")
    print(table.render(made))
    memory = table.render_memory(made)
    if memory:
        print(f"\npeak memory above the inputs and parameters\n{memory}")
    shares = report.render_shares(made)
    if shares:
        print(f"\nattention in the block\n{shares}")
    reasons = table.reasons(made)
    if reasons:
        print("\n" + "\n".join(reasons))


if __name__ == "__main__":
    raise SystemExit(main())

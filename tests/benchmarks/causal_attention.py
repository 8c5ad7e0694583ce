# SPDX-License-Identifier: Apache-2.0
"""Which attention implementation is fastest for long causal sequences on this machine.

    python -m tests.benchmarks.causal_attention --json out.json
    python -m tests.benchmarks.causal_attention --lengths 65536 --head-dims 120,128 --implementations flash,cudnn

Every name of `ds4sci.attention.implementation`, on queries, keys and values that are views of one packed projection,
as our decoder's are. TFLOP/s counts the products that a causal mask leaves: 2 per multiplication and addition,
2 S^2 H D forward, 2.5 times that backward with the recomputation that flash attention does.

"auto" is the config's "fastest". "flex" comes last: it is compiled for each shape, which takes longer than all else.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from deepspeed_ds4sci.sequence.local_attention import IMPLEMENTATIONS, local_attention, unavailable_reason
from deepspeed_ds4sci.sequence.scores import ScoreRules
from tests.benchmarks.long_sequence.report import write
from tests.benchmarks.record import machine, machine_line
from tests.benchmarks.timing import clock_for

MODULE = "tests.benchmarks.causal_attention"
LEFT_OUT = ("math", "tiled")  # one holds S^2 scores, the other is not made for plain causal attention


def causal_flops(seq_len: int, heads: int, head_dim: int) -> dict[str, float]:
    forward = 2.0 * seq_len**2 * heads * head_dim
    return {"forward": forward, "forward+backward": 3.5 * forward}


def cases(options: argparse.Namespace) -> Iterator[dict]:
    """What a row of the record is about."""
    every = product(options.lengths, options.head_dims, options.implementations)
    for seq_len, head_dim, implementation in sorted(every, key=lambda case: case[2] == "flex"):
        heads = options.width // head_dim
        yield {"seq_len": seq_len, "heads": heads, "head_dim": head_dim, "implementation": implementation}


def measure(case: dict, device: torch.device, dtype: torch.dtype, ms: float) -> dict:
    """Milliseconds, TFLOP/s and seconds of the first call of a case, or why there are none."""
    seq_len, heads, head_dim, implementation = case.values()
    reason = unavailable_reason(implementation, device.type)
    if reason is not None:
        return {"failed": reason}
    if implementation == "flex":
        # For this shape alone, as in training: else for any length from the second on, and after eight not at all.
        torch._dynamo.reset()
    flops, found = causal_flops(seq_len, heads, head_dim), {}
    rules = ScoreRules(scale=head_dim**-0.5, right=0, num_heads=heads)
    clock = clock_for(device)
    try:
        packed = torch.randn(1, seq_len, 3 * heads, head_dim, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn(1, seq_len, heads, head_dim, device=device, dtype=dtype)

        def forward():
            with torch.no_grad():
                local_attention(*packed.split(heads, 2), rules, implementation)

        def both():
            torch.autograd.grad(local_attention(*packed.split(heads, 2), rules, implementation), packed, grad)

        for name, run in (("forward", forward), ("forward+backward", both)):
            began = time.perf_counter()
            run()
            first = time.perf_counter() - began
            milliseconds = clock.time(run, ms).median
            found[name] = {"ms": milliseconds, "tflops": flops[name] / milliseconds / 1e9, "first_seconds": first}
    except (RuntimeError, NotImplementedError) as error:  # a peer that cannot run this shape; no memory left
        return {**found, "failed": str(error).splitlines()[0][:200]}
    return found


def label(case: dict) -> str:
    return f"{case['seq_len']:>8,} {case['heads']:>3} x {case['head_dim']:<4} {case['implementation']:<12}"


def figures(found: dict) -> str:
    if "failed" in found:
        return f" failed: {found['failed']}"
    first = sum(entry["first_seconds"] for entry in found.values())
    parts = [f"{entry['ms']:>9.2f} ms {entry['tflops']:>6.1f}" for entry in found.values()]
    return "  ".join(parts) + (f"  first calls {first:.0f} s" if first >= 1 else "")


def markdown_attention(record: dict) -> str:
    """For a README: a line per shape; forward and forward + backward in ms, and TFLOP/s of the latter."""
    names = list(dict.fromkeys(row["implementation"] for row in record["rows"]))
    lines: dict[str, dict] = {}
    for row in record["rows"]:
        shape = f"{row['seq_len']:,}, {row['heads']} x {row['head_dim']}"
        both = row.get("forward+backward")
        figure = "-" if both is None else f"{row['forward']['ms']:.3g} / {both['ms']:.3g}, {both['tflops']:.0f}"
        lines.setdefault(shape, {})[row["implementation"]] = figure
    rows = ["| tokens, heads x head dim (ms forward / both, TFLOP/s) | " + " | ".join(f"`{n}`" for n in names) + " |"]
    rows.append("|---" * (1 + len(names)) + "|")
    rows += [f"| {shape} | " + " | ".join(found.get(n, "-") for n in names) + " |" for shape, found in lines.items()]
    return "\n".join([*rows, "", f"{machine_line(record['machine'])} | `{record['machine']['command']}`", ""])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def add_case_arguments(parser: argparse.ArgumentParser, lengths: list[int], implementations: list[str]) -> None:
    """What is run, with these defaults, and where its record goes."""
    parser.add_argument("--lengths", type=_numbers, default=lengths, help="tokens, separated by commas")
    parser.add_argument("--head-dims", type=_numbers, default=[120, 128], help="the width is cut into heads of these")
    parser.add_argument("--width", type=int, default=3840, help="channels; rounded down to whole heads")
    parser.add_argument("--implementations", type=lambda text: text.split(","), default=implementations)
    parser.add_argument("--json", type=Path, help="where the record goes")


def parse_cases(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The options; an implementation that does not exist ends the program."""
    options = parser.parse_args(argv)
    unknown = sorted(set(options.implementations) - set(IMPLEMENTATIONS))
    if unknown:
        parser.error(f"--implementations must be of {', '.join(IMPLEMENTATIONS)}, got {', '.join(unknown)}")
    return options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser, [8192, 32768, 65536], [name for name in IMPLEMENTATIONS if name not in LEFT_OUT])
    parser.add_argument("--min-ms", type=float, default=100, help="runs of a case add up to this")
    options = parse_cases(parser, argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"machine": machine(device, argv, MODULE), "rows": []}
    print(f"{machine_line(record['machine'])}\ntokens, heads x head dim; forward, forward+backward: ms, TFLOP/s")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for case in cases(options):
        print(label(case), end="", flush=True)
        found = measure(case, device, dtype, options.min_ms)
        print(figures(found), flush=True)
        record["rows"].append({**case, **found})
        if options.json:
            write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

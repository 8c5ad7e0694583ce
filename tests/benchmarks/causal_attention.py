# SPDX-License-Identifier: Apache-2.0
"""Which attention implementation is fastest for long causal sequences on this machine.

    python -m tests.benchmarks.causal_attention --json out.json
    python -m tests.benchmarks.causal_attention --lengths 65536 --head-dims 120,128 --implementations flash,cudnn

Every name of `ds4sci.attention.implementation`, on queries, keys and values that are views of one packed projection,
as our decoder's are. TFLOP/s counts the products that a causal mask leaves: 2 per multiplication and addition,
2 S^2 H D forward, 2.5 times that backward with the recomputation that flash attention does.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from deepspeed_ds4sci.sequence.local_attention import IMPLEMENTATIONS, local_attention, unavailable_reason
from deepspeed_ds4sci.sequence.scores import ScoreRules
from tests.benchmarks.record import machine, machine_line
from tests.benchmarks.timing import clock_for

MODULE = "tests.benchmarks.causal_attention"
LEFT_OUT = ("math", "tiled")  # one holds S^2 scores, the other is not made for plain causal attention


def causal_flops(seq_len: int, heads: int, head_dim: int) -> dict[str, float]:
    forward = 2.0 * seq_len**2 * heads * head_dim
    return {"forward": forward, "forward+backward": 3.5 * forward}


def measure(
    seq_len: int, heads: int, head_dim: int, implementation: str, device: torch.device, dtype: torch.dtype, ms: float
) -> dict:
    """One row of the record: milliseconds and TFLOP/s, or why there are none."""
    row = {"seq_len": seq_len, "heads": heads, "head_dim": head_dim, "implementation": implementation}
    reason = unavailable_reason(implementation, device.type)
    if reason is not None:
        return {**row, "failed": reason}
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

        flops = causal_flops(seq_len, heads, head_dim)
        for name, run in (("forward", forward), ("forward+backward", both)):
            milliseconds = clock.time(run, ms).median
            row[name] = {"ms": milliseconds, "tflops": flops[name] / milliseconds / 1e9}
    except (RuntimeError, NotImplementedError) as error:  # a peer that cannot run this shape; no memory left
        return {**row, "failed": str(error).splitlines()[0][:200]}
    return row


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for seq_len in options.lengths:
        for head_dim in options.head_dims:
            for implementation in options.implementations:
                yield measure(
                    seq_len, options.width // head_dim, head_dim, implementation, device, dtype, options.min_ms
                )


def line(row: dict) -> str:
    text = f"{row['seq_len']:>8,} {row['heads']:>3} x {row['head_dim']:<4} {row['implementation']:<11}"
    if "failed" in row:
        return f"{text} failed: {row['failed']}"
    parts = (f"{row[name]['ms']:>9.2f} ms {row[name]['tflops']:>6.1f}" for name in ("forward", "forward+backward"))
    return text + "  ".join(parts)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=_numbers, default=[8192, 32768, 65536], help="tokens, separated by commas")
    parser.add_argument("--head-dims", type=_numbers, default=[120, 128], help="the width is cut into heads of these")
    parser.add_argument("--width", type=int, default=3840, help="channels; rounded down to whole heads")
    parser.add_argument(
        "--implementations",
        type=lambda text: text.split(","),
        default=[name for name in IMPLEMENTATIONS if name not in LEFT_OUT],
    )
    parser.add_argument("--min-ms", type=float, default=100, help="runs of a case add up to this")
    parser.add_argument("--json", type=Path, help="where the record goes")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.implementations) - set(IMPLEMENTATIONS))
    if unknown:
        parser.error(f"--implementations must be of {', '.join(IMPLEMENTATIONS)}, got {', '.join(unknown)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"machine": machine(device, argv, MODULE), "rows": []}
    print(f"{machine_line(record['machine'])}\ntokens, heads x head dim; forward, forward+backward: ms, TFLOP/s")
    for row in rows(options, device):
        print(line(row), flush=True)
        record["rows"].append(row)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""How often DeepSpeed's own unit test of Evoformer attention passes, over seeds, and whom it fails.

    python -m tests.benchmarks.deepspeed_tolerance --seeds 20 --json out.json

The test draws new inputs in every run and compares with eager PyTorch in the same 16-bit dtype, with limits in
absolute numbers. Its reference is rounded after every operation, so what a run says also depends on how those
roundings fall. To tell apart what an op does and what the reference does, three contestants take the test: this
project's op, DeepSpeed's own kernels (`prepare_peers library`), and the exact result, fp64 rounded once.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks.case import DTYPES
from tests.benchmarks.long_sequence.report import write
from tests.benchmarks.peers.deepspeed import DEEPSPEED, has_library, own_attention
from tests.benchmarks.record import machine, machine_line
from tests.benchmarks.table import aligned
from tests.helpers.inputs import AttentionInputs
from tests.helpers.numerics import Results, fp64_reference, run

SHAPES = ((1, 256, 256, 4, 32), (1, 512, 256, 8, 8))
"""[B, N, L, H, D] of the test."""
LIMITS = {"fp16": 1e-2, "bf16": 5e-2}
"""Largest absolute difference of output and gradients that the test accepts; twice as much for d(pair_bias)."""
NAMES = ("o", "dq", "dk", "dv", "dpair_bias")


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> AttentionInputs:
    """As the test does; every second key or so of a row has a mask bias of -1e9 (fp16: -inf)."""
    batch, rows, length, heads, _ = shape
    where = {"dtype": dtype, "device": device}
    q, k, v = (torch.randn(shape, **where).requires_grad_() for _ in range(3))
    pair = torch.randn(batch, 1, heads, length, length, **where).requires_grad_()
    mask = 1e9 * (torch.randint(0, 2, (batch, rows, 1, 1, length), **where) - 1)
    return AttentionInputs(q, k, v, mask, pair, None, torch.rand(shape, **where))


def eager(q: Tensor, k: Tensor, v: Tensor, *, mask_bias: Tensor, pair_bias: Tensor) -> Tensor:
    """The test's reference in its order: it scales logits, where `numerics.eager_evoformer_attention` scales q."""
    q, k, v = (x.transpose(2, 3) for x in (q, k, v))
    logits = q @ k.mT * q.shape[-1] ** -0.5 + mask_bias + pair_bias
    return (logits.softmax(-1) @ v).transpose(2, 3)


def exact(inputs: AttentionInputs) -> Results:
    """fp64, rounded once at the end."""
    found = fp64_reference(inputs)
    return Results({name: tensor.to(inputs.q.dtype) for name, tensor in found.tensors.items()})


def contestants(dtype: str, device: torch.device) -> dict[str, Callable[[AttentionInputs], Results]]:
    from deepspeed_ds4sci import DS4Sci_EvoformerAttention

    def of(attention):  # with DeepSpeed's signature
        return lambda inputs: run(
            lambda q, k, v, *, mask_bias, pair_bias: attention(q, k, v, [mask_bias, pair_bias]), inputs
        )

    found = {"exact": exact, "ours": of(DS4Sci_EvoformerAttention)}
    if DEEPSPEED.unavailable_reason(device.type) is None and has_library(dtype):
        found["deepspeed"] = of(own_attention(dtype))
    return found


def measure(shape, dtype: str, seeds: int, device: torch.device) -> list[dict]:
    """Per contestant: how many seeds pass, and the largest difference of each result over all seeds."""
    functions = contestants(dtype, device)
    lines = {name: {"passed": 0, "failed": {}, "worst": dict.fromkeys(NAMES, 0.0)} for name in functions}
    for seed in range(seeds):
        torch.manual_seed(seed)
        inputs = draw(shape, DTYPES[dtype], device)
        expected = run(eager, inputs)
        for name, function in functions.items():
            line, passes, found = lines[name], True, function(inputs)
            for what in NAMES:
                # In the dtype of the inputs, as the test has it.
                difference = (found[what] - expected[what]).abs().max().item()
                worst = line["worst"][what]
                if not (math.isnan(worst) or difference <= worst):  # a NaN stays
                    line["worst"][what] = difference
                if not difference < LIMITS[dtype] * (2 if what == "dpair_bias" else 1):
                    passes = False
                    line["failed"][what] = line["failed"].get(what, 0) + 1
            line["passed"] += passes
    return [
        {"shape": list(shape), "dtype": dtype, "contestant": name, "seeds": seeds, **line}
        for name, line in lines.items()
    ]


def table(record: dict) -> str:
    rows = [["shape", "dtype", "contestant", "passed", "failed by", *NAMES]]
    for line in record["lines"]:
        failed = ", ".join(f"{what} {count}" for what, count in line["failed"].items()) or "-"
        shape = "x".join(str(size) for size in line["shape"])
        worst = [f"{line['worst'][what]:.4g}" for what in NAMES]
        rows.append([shape, line["dtype"], line["contestant"], f"{line['passed']}/{line['seeds']}", failed, *worst])
    return aligned(rows)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--dtypes", default="fp16,bf16", help="separated by commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--tiny", action="store_true", help="rehearsal with one row")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    shapes = [(1, 1, 32, 2, 8)] if options.tiny else SHAPES
    lines = []
    for shape in shapes:
        for dtype in options.dtypes.split(","):
            lines += measure(shape, dtype, options.seeds, device)
    record = {"machine": machine(device, arguments, "tests.benchmarks.deepspeed_tolerance"), "lines": lines}
    print(f"{machine_line(record['machine'])}\n{table(record)}")
    if options.json:
        write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""How exact implementations of causal attention are at the lengths that train: output and gradients against fp64.

    python -m tests.benchmarks.causal_accuracy --lengths 65536,131072 --json out.json

Every implementation computes all heads, of queries, keys and values that are views of one packed projection. Of some
heads the definition is computed too, a block of rows at a time: in fp64, and rounded to the dtype of the inputs where
eager PyTorch rounds. The errors of both to fp64 are compared, and whole results with those of the first
implementation.
"""

import argparse
import importlib.metadata
import sys

import torch

from deepspeed_ds4sci.sequence.local_attention import local_attention, unavailable_reason
from deepspeed_ds4sci.sequence.scores import ScoreRules
from tests.benchmarks.causal_attention import add_case_arguments, parse_cases
from tests.benchmarks.long_sequence.report import write
from tests.benchmarks.record import machine, machine_line

MODULE = "tests.benchmarks.causal_accuracy"
TENSORS = ("o", "dq", "dk", "dv")
BLOCK_ROWS = 512
PACKAGES = {"flash_attn": "flash-attn", "flash_attn_4": "flash-attn-4"}
"""Of implementations that are not torch's or ours; the record has their versions."""


@torch.no_grad()
def definition(q, k, v, do, dtype: torch.dtype, block_rows: int = BLOCK_ROWS) -> list[torch.Tensor]:
    """o, dq, dk, dv of one head, [S, D] each, every step in `dtype`; sums over rows (dk, dv) are rounded once."""
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
    wide = torch.promote_types(dtype, torch.float32)
    scaled = q * q.shape[1] ** -0.5
    o, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
    for first in range(0, len(q), block_rows):
        last = min(first + block_rows, len(q))
        rows = slice(first, last)
        keys, values = k[:last], v[:last]
        scores = scaled[rows] @ keys.T
        above = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu(1)
        scores[:, first:].masked_fill_(above, float("-inf"))
        p = scores.softmax(-1)
        o[rows] = p @ values
        dv[:last] += p.T.to(wide) @ do[rows].to(wide)
        ds = torch.ops.aten._softmax_backward_data(do[rows] @ values.T, p, -1, dtype)
        dq[rows] = (ds @ keys) * q.shape[1] ** -0.5
        dk[:last] += ds.T.to(wide) @ scaled[rows].to(wide)
    return [o, dq, dk.to(dtype), dv.to(dtype)]


def computed(implementation: str, packed, do) -> list[torch.Tensor]:
    """o, dq, dk, dv of all heads, [S, H, D] each."""
    heads, head_dim = do.shape[2:]
    rules = ScoreRules(scale=head_dim**-0.5, right=0, num_heads=heads)
    packed = packed.detach().requires_grad_()
    o = local_attention(*packed.split(heads, 2), rules, implementation)
    (gradient,) = torch.autograd.grad(o, packed, do)
    return [x[0] for x in (o.detach(), *gradient.split(heads, 2))]


def errors(actual: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Root mean square and largest error, both over the root mean square of the reference."""
    error, norm = actual.double() - reference, reference.square().mean().sqrt()
    return {"rms": float(error.square().mean().sqrt() / norm), "max": float(error.abs().max() / norm)}


def measure(seq_len, heads, head_dim, implementations, device, dtype, checked_heads=3) -> list[dict]:
    """A row of the record per implementation."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = (1, seq_len, 3 * heads, head_dim), (1, seq_len, heads, head_dim)
    packed, do = (torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes)
    checked = sorted({round(i * (heads - 1) / max(checked_heads - 1, 1)) for i in range(checked_heads)})
    inputs = [[*(x[0, :, h] for x in packed.split(heads, 2)), do[0, :, h]] for h in checked]
    exact = [torch.stack(parts) for parts in zip(*(definition(*x, torch.float64) for x in inputs), strict=True)]
    eager = [torch.stack(parts) for parts in zip(*(definition(*x, dtype) for x in inputs), strict=True)]
    of_eager = {name: errors(a, e) for name, a, e in zip(TENSORS, eager, exact, strict=True)}
    del eager, inputs
    rows, first = [], None
    for implementation in implementations:
        row = {"seq_len": seq_len, "heads": heads, "head_dim": head_dim, "implementation": implementation}
        rows.append(row)
        reason = unavailable_reason(implementation, device.type)
        if reason is not None:
            row["failed"] = reason
            continue
        results = computed(implementation, packed, do)
        of_heads = [x[:, checked].transpose(0, 1) for x in results]
        row |= {
            "checked_heads": checked,
            "errors": {name: errors(a, e) for name, a, e in zip(TENSORS, of_heads, exact, strict=True)},
            "eager": of_eager,
            "finite": all(bool(x.isfinite().all()) for x in results),
        }
        if implementation in PACKAGES:
            row["version"] = importlib.metadata.version(PACKAGES[implementation])
        if first is None:
            first = implementation, results
        else:
            pairs = zip(TENSORS, results, first[1], strict=True)
            row["difference"] = {"to": first[0]} | {name: difference(a, b) for name, a, b in pairs}
    return rows


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference over that of `b`, of all heads, one at a time."""
    squares = [[(x - y).square().sum(), y.square().sum()] for x, y in zip(a.mT.float(), b.mT.float(), strict=True)]
    return float((sum(s[0] for s in squares) / sum(s[1] for s in squares)).sqrt())


def markdown_accuracy(record: dict) -> str:
    """For a README: rms errors as multiples of eager's, and the difference to the first implementation."""
    rows = [
        "| tokens, heads x head dim | implementation | rms error of o / dq / dk / dv over eager's "
        "| largest error, likewise | difference over norm |",
        "|---" * 5 + "|",
    ]
    for row in record["rows"]:
        if "errors" not in row:
            continue
        ratios = [
            " / ".join(f"{row['errors'][name][kind] / row['eager'][name][kind]:.2f}" for name in TENSORS)
            for kind in ("rms", "max")
        ]
        to = row.get("difference")
        compared = "-" if to is None else " / ".join(f"{to[name]:.4f}" for name in TENSORS) + f" to `{to['to']}`"
        shape = f"{row['seq_len']:,}, {row['heads']} x {row['head_dim']}"
        name = f"`{row['implementation']}`" + (f" {row['version']}" if "version" in row else "")
        rows.append(f"| {shape} | {name} | {ratios[0]} | {ratios[1]} | {compared} |")
    return "\n".join([*rows, "", f"{machine_line(record['machine'])} | `{record['machine']['command']}`", ""])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser, [65536], ["cudnn", "flash_attn_4"])
    options = parse_cases(parser, argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record = {"machine": machine(device, argv, MODULE), "rows": []}
    for seq_len in options.lengths:
        for head_dim in options.head_dims:
            heads = options.width // head_dim
            found = measure(seq_len, heads, head_dim, options.implementations, device, dtype)
            record["rows"] += found
            for row in found:
                print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
            if options.json:
                write(options.json, record)
    print(markdown_accuracy(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())

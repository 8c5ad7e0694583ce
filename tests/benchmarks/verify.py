# SPDX-License-Identifier: Apache-2.0
"""The gate before the clock: what is timed must be right.

Everything is compared in fp64 on a part of the problem that is cheap at any size: the output and the gradients of q,
k, v and the output's gate on a few rows, the gradient of the pair bias on a few queries summed over all rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.benchmarks.case import Case, Inputs
from tests.benchmarks.peers.base import Call

# Largest relative rms error. Rounding costs 16-bit kernels about a third of it; one wrong tile costs more. Looser than
# the accuracy tests on purpose: peers that add their bias gradient up in 16 bit are inaccurate, not wrong.
LIMITS = {"bf16": 5e-2, "fp16": 1e-2, "fp32": 5e-3}
NUM_ROWS = 3
NUM_QUERIES = 8
CHUNK = 2**25  # elements of the largest fp64 temporary


@dataclass(frozen=True)
class Expected:
    """fp64 results on the chosen rows and queries."""

    rows: list[int]  # of the flattened [B * N]
    queries: list[int]
    o: Tensor  # [rows, Lq, H, D]
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dgate: Tensor | None
    dpair_bias: Tensor | None  # [B, H, queries, Lk]


def spread(count: int, size: int) -> list[int]:
    """At most `count` different indices of range(size), the first and the last among them."""
    return sorted({round(i * (size - 1) / max(count - 1, 1)) for i in range(count)})


def _weights(q: Tensor, k: Tensor, keep: Tensor | None, pair_bias: Tensor | None, scale: float) -> Tensor:
    """softmax of scale * q k^T + pair_bias over the keys that are kept; q [..., Lq, D], k [..., Lk, D]."""
    logits = scale * (q @ k.transpose(-1, -2))
    if pair_bias is not None:
        logits = logits + pair_bias
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    return torch.softmax(logits, dim=-1)


def _row(inputs: Inputs, case: Case, row: int) -> tuple[Tensor, ...]:
    """o, dq, dk, dv, dgate (zeros without a gate) of one row, [L, H, D] each, one head at a time."""
    b, n = divmod(row, case.rows)
    scale = case.head_dim**-0.5
    keep = None if inputs.keep is None else inputs.keep[b, n]
    outputs = []
    for h in range(case.heads):
        q, k, v, do = (x[b, n, :, h].double() for x in (inputs.q, inputs.k, inputs.v, inputs.do))
        pair_bias = None if inputs.pair_bias is None else inputs.pair_bias[b, 0, h].double()
        weights = _weights(q, k, keep, pair_bias, scale)
        o = weights @ v
        dgate, opened = torch.zeros_like(o), 1.0
        if inputs.gate is not None:
            opened = torch.sigmoid(inputs.gate[b, n, :, h].double())
            dgate, do = do * o * opened * (1 - opened), do * opened
        dlogits = weights * (do @ v.T - (do * o).sum(-1, keepdim=True))
        outputs.append((opened * o, scale * (dlogits @ k), scale * (dlogits.T @ q), weights.T @ do, dgate))
    return tuple(torch.stack(parts, dim=1) for parts in zip(*outputs, strict=True))


def _pair_gradient(inputs: Inputs, case: Case, queries: list[int]) -> Tensor:
    """Gradient of the pair bias at the chosen queries, summed over all rows: [B, H, queries, Lk]."""
    scale = case.head_dim**-0.5
    per_row = case.heads * case.k_len * max(len(queries), case.head_dim)
    chunk = max(1, CHUNK // per_row)
    sums = []
    for b in range(case.batch):
        bias = inputs.pair_bias[b, 0][:, queries].double()  # [H, queries, Lk]
        total = torch.zeros_like(bias)
        for first in range(0, case.rows, chunk):
            part = slice(first, min(first + chunk, case.rows))
            q, do = (x[b, part][:, queries].double().transpose(1, 2) for x in (inputs.q, inputs.do))
            if inputs.gate is not None:
                do = do * torch.sigmoid(inputs.gate[b, part][:, queries].double().transpose(1, 2))
            k, v = (x[b, part].double().transpose(1, 2) for x in (inputs.k, inputs.v))
            keep = None if inputs.keep is None else inputs.keep[b, part, None, None, :]
            weights = _weights(q, k, keep, bias, scale)  # [n, H, queries, Lk]
            dweights = do @ v.transpose(-1, -2)
            total += (weights * (dweights - (weights * dweights).sum(-1, keepdim=True))).sum(0)
        sums.append(total)
    return torch.stack(sums)


def expect(case: Case, inputs: Inputs) -> Expected:
    """The reference of a case; needs memory for one head of one row."""
    rows = spread(NUM_ROWS, case.batch * case.rows)
    queries = spread(NUM_QUERIES, case.q_len)
    with torch.no_grad():
        parts = [_row(inputs, case, row) for row in rows]
        o, dq, dk, dv, dgate = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        with_pair = inputs.pair_bias is not None and case.pair_grad
        dpair_bias = _pair_gradient(inputs, case, queries) if with_pair else None
    return Expected(rows, queries, o, dq, dk, dv, dgate if case.gate else None, dpair_bias)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; infinite unless every element is finite."""
    if not torch.isfinite(actual).all():
        return float("inf")
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def run_once(call: Call, backward: bool) -> dict[str, Tensor]:
    """The output "o" and, with `backward`, the gradients by canonical name."""
    if not backward:
        with torch.no_grad():
            return {"o": call.forward()}
    o = call.forward()
    gradients = torch.autograd.grad(o, list(call.leaves.values()), call.grad_output)
    return {"o": o.detach(), **dict(zip(call.leaves, gradients, strict=True))}


def errors_of(case: Case, call: Call, expected: Expected, backward: bool) -> dict[str, float]:
    """Relative rms error of each result: "o", and with `backward` "dq", "dk", "dv" and what else the call has."""
    errors = {}
    results = run_once(call, backward)
    for name in list(results):
        actual = call.canonical(name, results.pop(name))
        if name == "pair_bias":  # [B, 1, H, Lq, Lk]
            actual, wanted = actual[:, 0][:, :, expected.queries], expected.dpair_bias
        else:
            actual = actual.reshape(case.batch * case.rows, *actual.shape[2:])[expected.rows]
            wanted = getattr(expected, name if name == "o" else f"d{name}")
        errors[name if name == "o" else f"d{name}"] = relative_error(actual, wanted)
    return errors


def wrong_reason(case: Case, errors: dict[str, float]) -> str | None:
    """Why these errors do not pass, or None."""
    limit = LIMITS[case.dtype]
    bad = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= limit]
    return f"relative error above {limit:.0e}: {', '.join(bad)}" if bad else None

# SPDX-License-Identifier: Apache-2.0
"""The definition of Evoformer attention in plain PyTorch: oracle of every test, source of second derivatives.

Memory grows with B * N * H * Lq * Lk. Nothing picks this path by itself; ask for it with implementation="reference".

Axes: B batch, N rows that do not attend to each other, L attended length (Lq queries, Lk keys), H heads, D head dim.
"""

import math

import torch
from torch import Tensor

from ._precision import in_own_precision

NEG_INF = -math.inf
LARGE_BIAS = 1e3


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lse_dtype(q: Tensor) -> torch.dtype:
    """The dtype in which lse is kept from forward to backward: fp32, and fp64 for fp64 and on the CPU.

    The rounding of lse changes all weights of a row by the same factor. At logits of 1e4 that is 1e-3 in fp32, which
    a CPU can avoid for nothing.
    """
    return torch.float64 if q.dtype == torch.float64 or q.device.type == "cpu" else torch.float32


def row_shift(largest: Tensor) -> Tensor:
    """What to subtract from a bias row whose largest entry this is: that entry if it is large and finite, else 0.

    Softmax does not change when a row moves by a constant. Without it a row with -1e9 on every key keeps the digits of
    q k^T that fp32 would lose beside 1e9. Rows of ordinary size stay as they are: a subtraction rounds too.
    """
    return largest.masked_fill((largest.abs() <= LARGE_BIAS) | (largest == NEG_INF), 0.0)


def _biases_and_dropped(
    mask_bias: Tensor | None, pair_bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Sum of the biases, 0 where a key is dropped, and the boolean "dropped"; both broadcast to [B, N, H, Lq, Lk]."""
    total = dropped = None
    for bias in (mask_bias, pair_bias):
        if bias is None:
            continue
        if bias.dtype == torch.bool:
            gone = ~bias
            value = None
        else:
            bias = bias.to(dtype)
            gone = bias == NEG_INF
            value = bias.masked_fill(gone, 0.0)
            value = value - row_shift(bias.detach().amax(dim=-1, keepdim=True))
        dropped = gone if dropped is None else dropped | gone
        if value is not None:
            total = value if total is None else total + value
    return total, dropped


def softmax_and_lse(
    q: Tensor, k: Tensor, mask_bias: Tensor | None, pair_bias: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The attention weights [B, N, H, Lq, Lk] and lse [B, N, H, Lq]; arguments as for `attention_and_lse`."""
    dtype = compute_dtype(q.dtype)
    queries, keys = (x.to(dtype).transpose(2, 3) for x in (q, k))  # [B, N, H, L, D]
    logits = (queries * softmax_scale) @ keys.transpose(-1, -2)  # [B, N, H, Lq, Lk]
    bias, dropped = _biases_and_dropped(mask_bias, pair_bias, dtype)
    if bias is not None:
        logits = logits + bias
    if dropped is not None:
        # Before the exponential, so that a dropped key with a huge logit cannot bring inf * 0 into a gradient.
        logits = logits.masked_fill(dropped, NEG_INF)
    largest = logits.detach().amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest == NEG_INF, 0.0)
    weights = torch.exp(logits - largest)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0
    lse = (total.log() + largest).masked_fill(empty, math.inf).squeeze(-1)
    return weights / (total + empty.to(dtype)), lse


def attention_and_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    gate: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """o = sigmoid(gate) * softmax(softmax_scale * q k^T + mask_bias + pair_bias) v, and the log of the softmax sum.

    A key is dropped if either bias is -inf there. A row with no key left gives 0 and has gradient 0.

    Args:
        q: [B, N, Lq, H, D]; k, v: [B, N, Lk, H, D]; any float dtype, any strides. Lk >= 1.
        mask_bias: [B|1, N|1, 1, 1, Lk], float (added) or bool (True = keep).
        pair_bias: [B|1, N|1, H|1, Lq, Lk], float.
        gate: [B, N, Lq, H, D], float; None: o is not multiplied.
        softmax_scale: multiplies q k^T.

    Returns:
        o [B, N, Lq, H, D] in q's dtype; lse [B, N, H, Lq], natural log, in fp32 (fp64 for fp64), of the logits less
        `row_shift` of each bias; +inf for a row with no key left. Both can be differentiated twice.
    """
    weights, lse = softmax_and_lse(q, k, mask_bias, pair_bias, softmax_scale)
    o = weights @ v.to(weights.dtype).transpose(2, 3)
    if gate is not None:
        o = o * torch.sigmoid(gate.to(weights.dtype)).transpose(2, 3)
    return o.transpose(2, 3).to(q.dtype).contiguous(), lse


def evoformer_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    gate: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """`attention_and_lse` with the signature of the public op: o [B, N, Lq, H, D]."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return attention_and_lse(q, k, v, mask_bias, pair_bias, gate, scale)[0]


def _in_graph(tensor: Tensor | None, wanted: bool) -> Tensor | None:
    """A distinct autograd variable for `tensor`, so that one tensor passed as q and as k gets two gradients."""
    if tensor is None or not wanted:
        return tensor
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def reference_gradients(
    do: Tensor, inputs: tuple[Tensor | None, ...], softmax_scale: float, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of `attention_and_lse`, written out: dS = P * (dP - rowsum(P * dP)) with P the weights, dP = do v^T.

    With a gate of sigmoid s, do * s takes the place of do, and the gate's gradient is do * (P v) * s * (1 - s).

    Args:
        do: [B, N, Lq, H, D], the gradient of o.
        inputs: (q, k, v, mask_bias, pair_bias, gate) as for `attention_and_lse`.
        wanted: which of the six gradients to compute; the others are None.
    """
    q, k, v, mask_bias, pair_bias, gate = inputs
    weights, _ = softmax_and_lse(q, k, mask_bias, pair_bias, softmax_scale)  # [B, N, H, Lq, Lk]
    queries, keys, values, do = (x.to(weights.dtype).transpose(2, 3) for x in (q, k, v, do))  # [B, N, H, L, D]
    if gate is not None:
        dgated, opened = do, torch.sigmoid(gate.to(weights.dtype)).transpose(2, 3)
        do = do * opened
    dweights = do @ values.transpose(-1, -2)
    dlogits = weights * (dweights - (weights * dweights).sum(dim=-1, keepdim=True))
    formulas = (
        lambda: (dlogits @ keys).mul_(softmax_scale).transpose(2, 3),
        lambda: (dlogits.transpose(-1, -2) @ queries).mul_(softmax_scale).transpose(2, 3),
        lambda: (weights.transpose(-1, -2) @ do).transpose(2, 3),
        lambda: dlogits.sum_to_size(mask_bias.shape),
        lambda: dlogits.sum_to_size(pair_bias.shape),
        lambda: (dgated * (weights @ values) * opened * (1 - opened)).transpose(2, 3),
    )
    return tuple(
        formula().to(x.dtype).contiguous() if w else None
        for formula, x, w in zip(formulas, inputs, wanted, strict=True)
    )


def reference_second_gradients(
    cotangents: tuple[Tensor | None, ...],
    do: Tensor,
    inputs: tuple[Tensor | None, ...],
    softmax_scale: float,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of <cotangents, (dq, dk, dv, dmask_bias, dpair_bias, dgate)> with respect to do and the six inputs.

    Args:
        cotangents: one tensor or None for each first gradient, in the order above.
        do, inputs, softmax_scale: as for `reference_gradients`.
        needed: seven bools, for do, q, k, v, mask_bias, pair_bias, gate; the others are None.
    """
    differentiate_again = torch.is_grad_enabled()
    used = tuple(cotangent is not None for cotangent in cotangents)
    if not any(used) or not any(needed):
        return (None,) * len(needed)
    with torch.enable_grad():
        do = _in_graph(do, needed[0])
        variables = tuple(_in_graph(x, u or n) for x, u, n in zip(inputs, used, needed[1:], strict=True))
        o, _ = attention_and_lse(*variables, softmax_scale)
        first = torch.autograd.grad(o, [x for x, u in zip(variables, used, strict=True) if u], do, create_graph=True)
        second = iter(
            torch.autograd.grad(
                first,
                [x for x, n in zip((do, *variables), needed, strict=True) if n],
                [c for c in cotangents if c is not None],
                create_graph=differentiate_again,
                allow_unused=True,
            )
        )
    return tuple(next(second) if n else None for n in needed)


class ReferenceImplementation:
    """The definition above as an entry of the dispatch table."""

    name = "reference"

    def unsupported_reason(self, problem) -> str | None:
        return None

    @in_own_precision
    def forward(self, q, k, v, mask_bias, pair_bias, gate, softmax_scale):
        with torch.no_grad():
            o, lse = attention_and_lse(q, k, v, mask_bias, pair_bias, gate, softmax_scale)
        return o, lse.to(lse_dtype(q))

    @in_own_precision
    def backward(self, do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, wanted):
        return reference_gradients(do, (q, k, v, mask_bias, pair_bias, gate), softmax_scale, wanted)


REFERENCE = ReferenceImplementation()

# SPDX-License-Identifier: Apache-2.0
"""The numerical bar: the op may not be more wrong than eager PyTorch in the same dtype, measured against fp64.

For each output and gradient the rms error must be at most 1x (fp32, fp64: 2x) and the largest error at most 2x that of
eager PyTorch. Two allowances, for tensors in which eager is exact by luck (one key, a handful of elements): the error
of the fp64 result rounded to the dtype is always good enough, and FLOOR[dtype] times max |reference| is added, far
below one rounding for 16-bit dtypes and a few roundings for fp32. The rms of a few errors is a guess, so below FEW
elements its factor grows by three standard deviations of the ratio of two such guesses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention
from deepspeed_ds4sci.ops.reference import compute_dtype, evoformer_attention_reference

from .inputs import AttentionInputs, repeated_axes

MAX_FACTOR = 2.0
RMS_FACTOR = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 2.0, torch.float64: 2.0}
FEW = 1000
CANCELLED = 1e-3
# (rms, max), relative to the magnitude of the tensor.
FLOOR = {
    torch.float16: (2**-16, 2**-13),
    torch.bfloat16: (2**-13, 2**-10),
    torch.float32: (2**-24, 2**-20),
    torch.float64: (2**-50, 2**-47),
}


@dataclass
class Results:
    """Output and gradients of one run; a gradient nobody asked for is missing."""

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def eager_evoformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    gate: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """The op as models write it: matmul, add, softmax, matmul, sigmoid, product, every step rounded to q's dtype.

    Models get NaN in a row without a key; here such a row gives 0, so that its neighbours can be compared.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    queries, keys, values = (x.transpose(2, 3) for x in (q, k, v))
    logits = (queries * scale) @ keys.transpose(-1, -2)
    if mask_bias is not None:
        if mask_bias.dtype == torch.bool:
            logits = logits.masked_fill(~mask_bias, float("-inf"))
        else:
            logits = logits + mask_bias.to(q.dtype)
    if pair_bias is not None:
        logits = logits + pair_bias.to(q.dtype)
    empty = (logits == float("-inf")).all(dim=-1, keepdim=True)
    if empty.any():
        weights = torch.softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    else:
        weights = torch.softmax(logits, dim=-1)
    o = (weights @ values).transpose(2, 3)
    return o if gate is None else torch.sigmoid(gate) * o


def run(attention: Callable[..., Tensor], inputs: AttentionInputs, **options) -> Results:
    """o and the gradient of every input that requires one, from one forward and one backward of `attention`.

    A gradient is summed along axes that its input repeats, as the backward of the expand that made it would.
    """
    q, k, v, mask_bias, pair_bias, gate = inputs.tensors()
    gates = {} if gate is None else {"gate": gate}  # not every attention knows one
    o = attention(q, k, v, mask_bias=mask_bias, pair_bias=pair_bias, **gates, **options)
    sources = inputs.differentiable()
    results = {"o": o.detach()}
    if sources:
        grads = torch.autograd.grad(o, list(sources.values()), inputs.do.to(o.dtype))
        for (name, source), grad in zip(sources.items(), grads, strict=True):
            repeated = repeated_axes(source)
            results[f"d{name}"] = grad.sum(repeated, keepdim=True) if repeated else grad
    return Results(results)


def run_op(inputs: AttentionInputs, implementation: str | None = None, **options) -> Results:
    return run(evoformer_attention, inputs, implementation=implementation, **options)


def _take_rows(inputs: AttentionInputs, rows: slice) -> AttentionInputs:
    def take(x):
        if x is None or x.shape[1] == 1:
            return x
        return x.detach()[:, rows].requires_grad_(x.requires_grad)

    return AttentionInputs(*(take(x) for x in inputs.tensors()), take(inputs.do))


def _join(parts: list[Tensor], whole: Tensor) -> Tensor:
    """Results of row chunks: side by side where the tensor has rows, summed where the rows share it."""
    if whole.shape[1] == 1 or 1 in repeated_axes(whole):
        return torch.stack(parts).sum(0, dtype=compute_dtype(whole.dtype))
    return torch.cat(parts, dim=1)


def run_in_chunks(
    attention: Callable[..., Tensor], inputs: AttentionInputs, *, max_bytes: int = 1 << 30, **options
) -> Results:
    """`run` a few rows at a time, so that tensors with one element per logit stay below about `max_bytes` each.

    Gradients shared by the rows are rounded once per chunk, then summed in fp32 (fp64 for fp64).
    """
    batch, rows, q_len, heads, _ = inputs.q.shape
    per_row = batch * q_len * heads * inputs.k.shape[2] * inputs.q.element_size()
    step = max(1, min(rows, max_bytes // max(per_row, 1)))
    if step >= rows:
        return run(attention, inputs, **options)
    parts = [
        run(attention, _take_rows(inputs, slice(start, start + step)), **options) for start in range(0, rows, step)
    ]
    wholes = {"o": inputs.q} | {f"d{name}": x for name, x in inputs.differentiable().items()}
    return Results({name: _join([part[name] for part in parts], whole) for name, whole in wholes.items()})


def fp64_reference(inputs: AttentionInputs, *, max_bytes: int = 1 << 30, **options) -> Results:
    """The oracle: the definition in fp64 on the given (rounded) inputs, on their device."""
    return run_in_chunks(evoformer_attention_reference, inputs.to(torch.float64), max_bytes=max_bytes, **options)


def eager_results(inputs: AttentionInputs, *, max_bytes: int = 1 << 30, **options) -> Results:
    """Eager PyTorch in the dtype of the inputs."""
    return run_in_chunks(eager_evoformer_attention, inputs, max_bytes=max_bytes, **options)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def assert_no_worse_than_eager(
    name: str,
    actual: Tensor,
    eager: Tensor,
    reference: Tensor,
    *,
    magnitude: float | None = None,
    rms_factor: float | None = None,
    max_factor: float = MAX_FACTOR,
) -> None:
    """Fail unless `actual` is as right as the bar at the top of this file asks.

    Args:
        name: of the tensor, for the message.
        actual: under test. eager: same formula, same dtype, plain PyTorch. reference: fp64.
        magnitude: what the floor is relative to; default max |reference|. Gradients that cancel to almost nothing need
            the size of the terms that cancelled.
        rms_factor: default RMS_FACTOR[actual.dtype].
    """
    assert actual.shape == reference.shape, f"{name}: shape {list(actual.shape)}, expected {list(reference.shape)}"
    if reference.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} elements are not finite"
    magnitude = reference.abs().max().item() if magnitude is None else magnitude
    rms_floor, max_floor = (part * magnitude for part in FLOOR[actual.dtype])
    rms_factor = RMS_FACTOR[actual.dtype] if rms_factor is None else rms_factor
    count = int(torch.count_nonzero(reference))
    if count < FEW:
        rms_factor *= 1 + 3 / max(count, 1) ** 0.5
    rounded = reference.to(actual.dtype)
    error, eager_error, rounding_error = (x.double() - reference.double() for x in (actual, eager, rounded))
    for kind, measure, factor, floor in (
        ("rms", _rms, rms_factor, rms_floor),
        ("max", lambda x: x.abs().max().item(), max_factor, max_floor),
    ):
        got, eager_got, rounding = measure(error), measure(eager_error), measure(rounding_error)
        limit = max(factor * eager_got, rounding) + floor
        assert got <= limit, (
            f"{name}: {kind} error {got:.3e} > {limit:.3e} = max({factor} x eager's {eager_got:.3e}, rounding "
            f"{rounding:.3e}) + floor {floor:.1e}; max |reference| {reference.abs().max().item():.3e}"
        )


def _magnitudes(inputs: AttentionInputs, reference: Results) -> dict[str, float]:
    """What the floors are relative to: max |reference|.

    Where one key has all the weight (the only key, or one far above the others) the gradients of q, k and the biases
    are sums of terms that cancel. A result below a thousandth of these terms is held to their size instead.
    """

    def longest(x):
        return x.detach().double().norm(dim=-1).max().item() if x.numel() else 0.0

    rows, q_len, heads, head_dim = inputs.q.shape[1:]
    dlogit = longest(inputs.do) * longest(inputs.v)
    terms = {
        "dq": dlogit * longest(inputs.k) * head_dim**-0.5,
        "dk": dlogit * longest(inputs.q) * (q_len / head_dim) ** 0.5,
        "dmask_bias": dlogit * (q_len * heads) ** 0.5,
        "dpair_bias": dlogit * rows**0.5,
    }
    magnitudes = {name: x.abs().max().item() if x.numel() else 0.0 for name, x in reference.tensors.items()}
    cancelled = {name: size for name, size in terms.items() if magnitudes.get(name, size) < CANCELLED * size}
    return magnitudes | cancelled


def check_against_eager(
    inputs: AttentionInputs, implementation: str | None = None, *, max_bytes: int = 1 << 30, **options
) -> Results:
    """Run the op and hold o and every gradient to the bar. Returns the op's results.

    Reusable on any device: inputs decide where it runs; `max_bytes` limits each tensor of the eager and fp64 runs.
    """
    actual = run_op(inputs, implementation, **options)
    reference = fp64_reference(inputs, max_bytes=max_bytes, **options)
    eager = eager_results(inputs, max_bytes=max_bytes, **options)
    magnitudes = _magnitudes(inputs, reference)
    for name in reference.tensors:
        assert_no_worse_than_eager(name, actual[name], eager[name], reference[name], magnitude=magnitudes[name])
    return actual

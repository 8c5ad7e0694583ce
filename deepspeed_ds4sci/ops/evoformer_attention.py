# SPDX-License-Identifier: Apache-2.0
"""The public op: checks its arguments, brings unusual forms to the canonical one, makes one call."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ._custom_op import evoformer_attn, is_unobserved

MAX_HEAD_DIM = 128
AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT_DTYPES = (*AUTOCAST_DTYPES, torch.float64)


def _require_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require_tensor(name, x)
        if x.dim() != 5:
            raise ValueError(f"{name} must have 5 axes [B, N, L, H, D], got shape {list(x.shape)}")
        if x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q = {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q = {q.device}, got {x.device}")
    batch, rows, _, heads, head_dim = q.shape
    expected = (batch, rows, k.shape[2], heads, head_dim)
    if k.shape != expected:
        form = f"[B, N, Lk, H, D] = [{batch}, {rows}, Lk, {heads}, {head_dim}]"
        raise ValueError(f"k must be {form}, got {list(k.shape)}")
    if v.shape != expected:
        raise ValueError(f"v must have the shape of k = {list(k.shape)}, got {list(v.shape)}")
    if head_dim > MAX_HEAD_DIM:
        raise NotImplementedError(f"the head dim of q must be at most {MAX_HEAD_DIM}, got {head_dim}")


def _check_bias(name: str, form: str, bias: Tensor, expected: tuple[int, ...], q: Tensor, allow_bool: bool) -> None:
    """`expected`: full sizes; where `form` allows 1 any entry of `bias` may be 1 instead."""
    _require_tensor(name, bias)
    allowed = (q.dtype, torch.float32) + ((torch.bool,) if allow_bool else ())
    if bias.dtype not in allowed:
        raise ValueError(f"{name} must be {' or '.join(str(d) for d in dict.fromkeys(allowed))}, got {bias.dtype}")
    if bias.device != q.device:
        raise ValueError(f"{name} must be on the device of q = {q.device}, got {bias.device}")
    num_broadcast = 2 if allow_bool else 3  # mask: B, N; pair bias: B, N, H
    if bias.dim() != 5 or any(
        got != want and not (got == 1 and axis < num_broadcast)
        for axis, (got, want) in enumerate(zip(bias.shape, expected, strict=True))
    ):
        raise ValueError(f"{name} must be {form} = {list(expected)}, got {list(bias.shape)}")


class _WithoutRepeats(torch.autograd.Function):
    """One copy of a tensor that repeats itself with stride 0 along some axes.

    The copies of an element are one number in memory, so only the sum of their gradients means anything, and whoever
    expanded the tensor adds them up. The gradient is therefore returned as the total, divided evenly over the copies
    and again repeated with stride 0: nothing of the expanded size is ever stored.
    """

    @staticmethod
    def forward(ctx, tensor, axes):
        ctx.sizes, ctx.copies = tensor.shape, 1
        for axis in axes:
            ctx.copies *= tensor.shape[axis]
            tensor = tensor.narrow(axis, 0, 1)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        return (grad / ctx.copies).expand(ctx.sizes), None


def without_repeats(tensor: Tensor, axes: Iterable[int]) -> Tensor:
    """`tensor` with size 1 along those of `axes` along which it is an expanded view; no copy, differentiable."""
    repeated = tuple(axis for axis in axes if tensor.shape[axis] > 1 and tensor.stride(axis) == 0)
    return _WithoutRepeats.apply(tensor, repeated) if repeated else tensor


def _check_gate(gate: Tensor, q: Tensor) -> None:
    _require_tensor("gate", gate)
    if gate.shape != q.shape:
        raise ValueError(f"gate must have the shape of q = {list(q.shape)}, got {list(gate.shape)}")
    if gate.dtype != q.dtype:
        raise ValueError(f"gate must have the dtype of q = {q.dtype}, got {gate.dtype}")
    if gate.device != q.device:
        raise ValueError(f"gate must be on the device of q = {q.device}, got {gate.device}")
    if gate.shape[-1] > 1 and gate.stride(-1) != 1:
        raise ValueError(f"gate must have stride 1 along its last axis, got strides {list(gate.stride())}")


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask_bias: Tensor | None, pair_bias: Tensor | None, gate: Tensor | None
) -> None:
    _check_qkv(q, k, v)
    if gate is not None:
        _check_gate(gate, q)
    batch, rows, q_len, heads, _ = q.shape
    k_len = k.shape[2]
    if mask_bias is not None:
        _check_bias("mask_bias", "[B, N, 1, 1, Lk]", mask_bias, (batch, rows, 1, 1, k_len), q, True)
    if pair_bias is not None:
        _require_tensor("pair_bias", pair_bias)
        per_row = pair_bias.dim() == 5 and pair_bias.shape[1] == rows and rows != 1
        form, bias_rows = ("[B, N, H, Lq, Lk]", rows) if per_row else ("[B, 1, H, Lq, Lk]", 1)
        _check_bias("pair_bias", form, pair_bias, (batch, bias_rows, heads, q_len, k_len), q, False)


# Forms of arguments that need no second look. Checks take as long as everything else before a small problem's kernels.
_canonical: set[tuple] = set()
_MAX_FORMS = 4096


def _form_of(
    q: Tensor, k: Tensor, v: Tensor, mask_bias: Tensor | None, pair_bias: Tensor | None, gate: Tensor | None
) -> tuple:
    """Everything that `_check` and `without_repeats` look at. For plain tensors: symbolic sizes have no hash."""
    return (
        *(q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device),
        None if mask_bias is None else (mask_bias.shape, mask_bias.dtype, mask_bias.device),
        None if pair_bias is None else (pair_bias.shape, pair_bias.dtype, pair_bias.device, pair_bias.stride()),
        None if gate is None else (gate.shape, gate.dtype, gate.device, gate.stride()),
    )


def _remember(form: tuple) -> None:
    if len(_canonical) >= _MAX_FORMS:
        _canonical.clear()
    _canonical.add(form)


def _under_autocast(q, k, v, mask_bias, pair_bias, gate):
    """q, k, v, gate in the autocast dtype; a bias that is then neither of that dtype nor fp32 follows. fp64 stays."""
    device_type = q.device.type
    if not torch.is_autocast_enabled(device_type):
        return q, k, v, mask_bias, pair_bias, gate
    dtype = torch.get_autocast_dtype(device_type)

    def cast(x, kept=()):
        return x.to(dtype) if isinstance(x, Tensor) and x.dtype in AUTOCAST_DTYPES and x.dtype not in kept else x

    fp32 = (torch.float32,)
    return cast(q), cast(k), cast(v), cast(mask_bias, fp32), cast(pair_bias, fp32), cast(gate)


def _rows_as_batch(q, k, v, mask_bias, pair_bias, gate, *rest):
    """A pair bias [B|1, N, H, Lq, Lk] that differs from row to row: rows become batch entries with their own bias."""
    batch, rows = q.shape[:2]
    if pair_bias.shape[0] == 1:  # [N, B, ...]: views only
        q, k, v, pair_bias = (x.transpose(0, 1) for x in (q, k, v, pair_bias))
        mask_bias, gate = (None if x is None else x.transpose(0, 1) for x in (mask_bias, gate))
        o = evoformer_attn(q, k, v, mask_bias, pair_bias, gate, *rest)
        return o.transpose(0, 1).contiguous()

    def fold(x):  # [B*N, 1, ...]
        return x.expand(batch, rows, *x.shape[2:]).reshape(batch * rows, 1, *x.shape[2:])

    mask_bias, gate = (None if x is None else fold(x) for x in (mask_bias, gate))
    o = evoformer_attn(fold(q), fold(k), fold(v), mask_bias, fold(pair_bias), gate, *rest)
    return o.view(batch, rows, *o.shape[2:])


def evoformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    gate: Tensor | None = None,
    softmax_scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention over L with two broadcast biases and a gate on the output, as used in the Evoformer.

    o = sigmoid(gate) * softmax(softmax_scale * q k^T + mask_bias + pair_bias) v, independently for each batch, row and
    head.

    Axes: B batch, N rows, L attended length (Lq queries, Lk keys), H heads, D head dim.

    Args:
        q: [B, N, Lq, H, D]; k, v: [B, N, Lk, H, D]; fp16, bf16, fp32 or fp64 (fp64 on the CPU), D <= 128, same device.
            Any strides; a last axis that is not contiguous is copied.
        mask_bias: [B, N, 1, 1, Lk], dtype of q or fp32, added to every head and query; or bool, True = keep.
            B and N may be 1.
        pair_bias: [B, 1, H, Lq, Lk], dtype of q or fp32. Shared by all rows; its gradient is summed over N in fp32.
            B and H may be 1 (shared over samples, heads). [B, N, H, Lq, Lk] is taken too, each row with its own bias.
            A view expanded along B, N or H costs what the tensor behind it costs.
        gate: [B, N, Lq, H, D], dtype of q: what the output is multiplied by, before its sigmoid. Any strides, the last
            axis contiguous. Without one o is not multiplied. The backward pass keeps the gate and the gated output, no
            ungated one.
        softmax_scale: multiplies q k^T. Default: D ** -0.5.
        implementation: "sm90", "sm80", "tiled", "reference", or None for the fastest supported here (never
            "reference"); the first choice of a kind is logged at level INFO by "deepspeed_ds4sci".

    Returns:
        o [B, N, Lq, H, D], dtype of q (of autocast inside such a region), contiguous. Extra memory grows with L, not
        L^2, except for "reference". A key is dropped where either bias is -inf; a row with no key left gives 0 and
        zero gradients. Gradients are bit-identical from run to run; second derivatives go through "reference".

    Raises:
        ValueError: a shape, dtype, device or stride does not match; the message gives argument, expected, got.
        NotImplementedError: D > 128, or the named implementation does not support this device, dtype or size.

    Source: Jumper et al. 2021, Supplementary Algorithms 7, 8, 13, 14.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require_tensor(name, x)
    direct = is_unobserved(q, k, v, mask_bias, pair_bias, gate)
    known = direct and not torch.is_autocast_enabled(q.device.type)
    form = _form_of(q, k, v, mask_bias, pair_bias, gate) if known else None
    if form is None or form not in _canonical:
        q, k, v, mask_bias, given, gate = _under_autocast(q, k, v, mask_bias, pair_bias, gate)
        _check(q, k, v, mask_bias, given, gate)
        pair_bias = None if given is None else without_repeats(given, (0, 1, 2))
        if form is not None and pair_bias is given:
            _remember(form)
    softmax_scale = (max(q.shape[-1], 1) ** -0.5) if softmax_scale is None else float(softmax_scale)
    attend = evoformer_attn if pair_bias is None or pair_bias.shape[1] == 1 else _rows_as_batch
    return attend(q, k, v, mask_bias, pair_bias, gate, softmax_scale, implementation, direct)

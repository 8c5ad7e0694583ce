# SPDX-License-Identifier: Apache-2.0
"""`DS4Sci_EvoformerAttention` with DeepSpeed's signature, for existing call sites. New code: `evoformer_attention`.

Beyond DeepSpeed's op: any number of leading axes, biases that broadcast over them, Lq != Lk, any L, fp32, the CPU.
The list of biases is read, never changed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention, without_repeats

MAX_BIASES = 2


def _check_bias(name: str, form: str, bias: Tensor, lead: tuple[int, ...], tail: tuple[int, ...], q: Tensor) -> None:
    """`tail`: full sizes of the last three axes; the first of them may be 1."""
    if not isinstance(bias, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor or None, got {type(bias).__name__}")
    if bias.device != q.device:
        raise ValueError(f"{name} must be on the device of Q = {q.device}, got {bias.device}")
    sizes = (1,) * (len(lead) + 3 - bias.dim()) + tuple(bias.shape)
    fits = bias.dim() >= 3 and len(sizes) == len(lead) + 3 and sizes[-2:] == tail[1:]
    if not fits or any(got not in (1, want) for got, want in zip(sizes[:-2], (*lead, tail[0]), strict=True)):
        raise ValueError(
            f"{name} must be {form} = {[*lead, *tail]}, all but the last two of which may be 1; got {list(bias.shape)}"
        )


def _in_op_dtype(name: str, bias: Tensor, q: Tensor, allow_bool: bool) -> Tensor:
    """A bias in a dtype the op takes: as it is or, from another float dtype, in fp32, which holds 16-bit values."""
    if bias.dtype in (q.dtype, torch.float32) or (allow_bool and bias.dtype == torch.bool):
        return bias
    if not bias.is_floating_point():
        raise ValueError(f"{name} must have a float dtype{' or be boolean' if allow_bool else ''}, got {bias.dtype}")
    return bias.to(torch.float32)


def _fold_bias(bias: Tensor | None, lead: tuple[int, ...], own: list[int], shared: list[int]) -> Tensor | None:
    """[*, x, y, z] -> [B|1, N|1, x, y, z]; `own` axes fold to B, `shared` axes to N; 1 where all of them are 1."""
    if bias is None:
        return None
    sizes = list(bias.shape)
    for axes in (own, shared):
        if any(sizes[a] != 1 for a in axes):
            for a in axes:
                sizes[a] = lead[a]
    bias = bias.expand(sizes).permute(*own, *shared, -3, -2, -1)
    return bias.reshape(math.prod([sizes[a] for a in own]), math.prod([sizes[a] for a in shared]), *sizes[-3:])


def _attend_with_folded_axes(q, k, v, mask_bias, pair_bias):
    """Leading axes along which the pair bias differs become B, the others N; q, k, v are copied if no view will do."""
    lead = tuple(q.shape[:-3])
    own = []
    if pair_bias is not None:
        pair_bias = without_repeats(pair_bias, range(len(lead)))
        own = [a for a in range(len(lead)) if pair_bias.shape[a] > 1]
    shared = [a for a in range(len(lead)) if a not in own]
    order = own + shared
    batch, rows = math.prod([lead[a] for a in own]), math.prod([lead[a] for a in shared])

    def fold(x):
        return x.permute(*order, -3, -2, -1).reshape(batch, rows, *x.shape[-3:])

    o = evoformer_attention(
        fold(q),
        fold(k),
        fold(v),
        mask_bias=_fold_bias(mask_bias, lead, own, shared),
        pair_bias=_fold_bias(pair_bias, lead, own, shared),
    )
    o = o.view(*(lead[a] for a in order), *o.shape[-3:])
    return o.permute(*(order.index(a) for a in range(len(lead))), -3, -2, -1).contiguous()


def DS4Sci_EvoformerAttention(Q: Tensor, K: Tensor, V: Tensor, biases: Sequence[Tensor | None]) -> Tensor:
    """softmax(Q K^T / sqrt(D) + biases[0] + biases[1]) V over L, separately for all leading axes and heads.

    Args:
        Q: [*, Lq, H, D]; K, V: [*, Lk, H, D]; fp16, bf16, fp32 or fp64, D <= 128. * is any number of axes; in
            DeepSpeed's own op it is batch, rows.
        biases: at most two; a missing one or None adds nothing.
            biases[0]: [*, 1, 1, Lk], the mask; additive, or bool with True = keep.
            biases[1]: [*, H, Lq, Lk], the pair bias, usually [B, 1, H, Lq, Lk].
            Leading axes and H may be 1, leading axes may be absent, and views expanded along them are not copied.
            A float dtype that is neither Q's nor fp32 is cast to fp32.

    Returns:
        [*, Lq, H, D] in Q's dtype (of autocast inside such a region), contiguous.

    Raises:
        ValueError: a shape, dtype or device does not match; the message gives argument, expected, got.
        NotImplementedError: D > 128.
    """
    for name, x in (("Q", Q), ("K", K), ("V", V)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() < 3:
            raise ValueError(f"{name} must be [*, L, H, D], got {list(x.shape)}")
        if x.shape[:-3] != Q.shape[:-3]:
            raise ValueError(
                f"{name} must have the leading axes of Q = {list(Q.shape[:-3])}, got {list(x.shape[:-3])}"
            )
    if len(biases) > MAX_BIASES:
        raise ValueError(f"biases must hold at most {MAX_BIASES} tensors, got {len(biases)}")
    mask_bias, pair_bias = (*biases, None, None)[:MAX_BIASES]
    lead = tuple(Q.shape[:-3])
    if mask_bias is not None:
        _check_bias("biases[0]", "[*, 1, 1, Lk]", mask_bias, lead, (1, 1, K.shape[-3]), Q)
        mask_bias = _in_op_dtype("biases[0]", mask_bias, Q, allow_bool=True)
    if pair_bias is not None:
        _check_bias("biases[1]", "[*, H, Lq, Lk]", pair_bias, lead, (Q.shape[-2], Q.shape[-3], K.shape[-3]), Q)
        pair_bias = _in_op_dtype("biases[1]", pair_bias, Q, allow_bool=False)
    mask_bias, pair_bias = (None if x is None else x[(None,) * (Q.dim() - x.dim())] for x in (mask_bias, pair_bias))
    if len(lead) == 2:
        return evoformer_attention(Q, K, V, mask_bias=mask_bias, pair_bias=pair_bias)
    return _attend_with_folded_axes(Q, K, V, mask_bias, pair_bias)

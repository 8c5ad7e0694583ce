# SPDX-License-Identifier: Apache-2.0
"""Which memory layouts the kernels read as they are, and the copies for all others.

The kernels read 16 bytes at a time: rows of the last axis must be contiguous, start at multiples of 16 bytes and, as
nobody knows what lies behind a tensor, hold whole 16 bytes. Hopper's copy engine, which feeds the kernels there, is
pickier about strides: it takes no axis that repeats itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT_BYTES = 16
_MAX_STRIDE = 2**31 - 1  # from one position of a row to the next, elements; kernels keep it in 32 bits
_COPY_ENGINE_STRIDE_BYTES = 2**40  # strides are below


def is_readable(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, by_copy_engine: bool = False
) -> bool:
    """Whether the kernels can read a tensor that starts at a multiple of 16 bytes; strides in elements.

    by_copy_engine: whether the kernels leave that to the copy engine.
    """
    if (stride[-1] != 1 and shape[-1] > 1) or shape[-1] * dtype.itemsize % _ALIGNMENT_BYTES != 0:
        return False
    steps = [s * dtype.itemsize for n, s in zip(shape[:-1], stride[:-1], strict=True) if n > 1]
    if by_copy_engine and not all(0 < step < _COPY_ENGINE_STRIDE_BYTES for step in steps):
        return False
    return all(step % _ALIGNMENT_BYTES == 0 for step in steps)


def rows_are_readable(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, by_copy_engine: bool = False
) -> bool:
    """The same for q, k, v, gate, o and do [B, N, L, H, D]."""
    return stride[2] <= _MAX_STRIDE and is_readable(shape, stride, dtype, by_copy_engine)


def addresses_are_aligned(*tensors: Tensor | None) -> bool:
    """Whether each of `tensors` starts at a multiple of 16 bytes."""
    bits = 0
    for x in tensors:
        if x is not None:
            bits |= x.data_ptr()
    return bits % _ALIGNMENT_BYTES == 0


def readable_rows(x: Tensor, by_copy_engine: bool = False) -> Tensor:
    """x [B, N, L, H, D], or a contiguous copy of it whose head dim is padded with zeros to a multiple of 16 bytes."""
    missing = -x.shape[-1] % (_ALIGNMENT_BYTES // x.element_size())
    if missing:
        return F.pad(x, (0, missing)).contiguous()
    if rows_are_readable(x.shape, x.stride(), x.dtype, by_copy_engine) and addresses_are_aligned(x):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # also of a contiguous tensor that starts elsewhere


def readable_pair_bias(pair_bias: Tensor | None, by_copy_engine: bool = False) -> Tensor | None:
    """pair_bias, or a copy whose rows start at multiples of 16 bytes and hold whole 16 bytes."""
    if pair_bias is None:
        return None
    *leading, k_len = pair_bias.shape
    strides = pair_bias.stride()
    if is_readable(pair_bias.shape, strides, pair_bias.dtype, by_copy_engine) and addresses_are_aligned(pair_bias):
        return pair_bias
    # The padding is read, not used; zeros, so that no tool takes it for a mistake.
    padding = -k_len % (_ALIGNMENT_BYTES // pair_bias.element_size())
    copy = pair_bias.new_zeros(*leading, k_len + padding)[..., :k_len]
    return copy.copy_(pair_bias)


def narrow(x: Tensor | None, head_dim: int) -> Tensor | None:
    """x without the padding of its head dim."""
    return x if x is None or x.shape[-1] == head_dim else x[..., :head_dim].contiguous()

# SPDX-License-Identifier: Apache-2.0
"""The mirror of EvoformerParams in csrc/evoformer_attn/params.h, and how tensors fill it."""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.bool: 3}
POINTERS = (
    *("q", "k", "v", "mask_bias", "pair_bias", "gate", "o", "lse"),
    *("d_o", "d_gate", "dq", "dk", "dv", "dpair_bias", "dmask_bias", "dpair_out", "workspace", "stream"),
)
_ROW_STRIDES = ("q_stride", "k_stride", "v_stride", "gate_stride", "d_o_stride")
_STRIDES = ("mask_stride_b", "mask_stride_n", "mask_stride_k", "pair_stride_b", "pair_stride_h", "pair_stride_q")
_INTS = (
    *("batch", "rows", "q_len", "k_len", "heads", "head_dim", "dtype", "mask_dtype", "pair_dtype"),
    *("mask_batch", "mask_rows", "pair_batch", "pair_heads", "dpair_splits"),
)


class RowStrides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("b", "n", "l", "h")]


class Params(ctypes.Structure):
    """Mirror of EvoformerParams in csrc/evoformer_attn/params.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in POINTERS]
        + [(name, RowStrides) for name in _ROW_STRIDES]
        + [(name, ctypes.c_int64) for name in _STRIDES]
        + [(name, ctypes.c_int32) for name in _INTS]
        + [("softmax_scale", ctypes.c_float)]
    )


class BiasLayout(NamedTuple):
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # elements
    dtype: torch.dtype


class Layout(NamedTuple):
    """All that a call passes but the addresses.

    v has the shape of k, the gate that of q, and all three have the dtype of q.
    """

    device: torch.device
    dtype: torch.dtype
    q_shape: tuple[int, ...]
    q_stride: tuple[int, ...]
    k_shape: tuple[int, ...]
    k_stride: tuple[int, ...]
    v_stride: tuple[int, ...]
    mask: BiasLayout | None
    pair: BiasLayout | None
    gate_stride: tuple[int, ...] | None
    softmax_scale: float


def layout_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    gate: Tensor | None,
    softmax_scale: float,
) -> Layout:
    return Layout(
        q.device,
        q.dtype,
        q.shape,
        q.stride(),
        k.shape,
        k.stride(),
        v.stride(),
        None if mask_bias is None else BiasLayout(mask_bias.shape, mask_bias.stride(), mask_bias.dtype),
        None if pair_bias is None else BiasLayout(pair_bias.shape, pair_bias.stride(), pair_bias.dtype),
        None if gate is None else gate.stride(),
        softmax_scale,
    )


def make_params(layout: Layout) -> Params:
    """The parameters of a forward call without its addresses, which are null."""
    batch, rows, q_len, heads, head_dim = layout.q_shape
    params = Params(
        q_stride=RowStrides(*layout.q_stride[:4]),
        k_stride=RowStrides(*layout.k_stride[:4]),
        v_stride=RowStrides(*layout.v_stride[:4]),
        batch=batch,
        rows=rows,
        q_len=q_len,
        k_len=layout.k_shape[2],
        heads=heads,
        head_dim=head_dim,
        dtype=_DTYPE_CODES[layout.dtype],
        dpair_splits=1,
        softmax_scale=layout.softmax_scale,
    )
    if layout.mask is not None:
        params.mask_dtype = _DTYPE_CODES[layout.mask.dtype]
        params.mask_batch, params.mask_rows = layout.mask.shape[:2]
        params.mask_stride_b, params.mask_stride_n, _, _, params.mask_stride_k = layout.mask.stride
    if layout.pair is not None:
        params.pair_dtype = _DTYPE_CODES[layout.pair.dtype]
        params.pair_batch, _, params.pair_heads = layout.pair.shape[:3]
        params.pair_stride_b, _, params.pair_stride_h, params.pair_stride_q, _ = layout.pair.stride
    if layout.gate_stride is not None:
        params.gate_stride = RowStrides(*layout.gate_stride[:4])
    return params


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of lse beside q of `dtype`: fp64 for fp32 problems, whose gradients would feel the rounding of fp32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def with_addresses(template: Params, q, k, v, mask_bias, pair_bias, gate, o, lse) -> Params:
    """A copy of its own for each call: threads may call at once."""
    params = Params.from_buffer_copy(template)
    params.q = q.data_ptr()
    params.k = k.data_ptr()
    params.v = v.data_ptr()
    params.o = o.data_ptr()
    params.lse = lse.data_ptr()
    if mask_bias is not None:
        params.mask_bias = mask_bias.data_ptr()
    if pair_bias is not None:
        params.pair_bias = pair_bias.data_ptr()
    if gate is not None:
        params.gate = gate.data_ptr()
    return params

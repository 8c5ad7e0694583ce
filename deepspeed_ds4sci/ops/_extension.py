# SPDX-License-Identifier: Apache-2.0
"""The compiled library behind a Python face: torch tensors in, torch tensors out.

The library is plain C (csrc/evoformer_attn/params.h) and knows nothing of torch, so another torch needs no rebuild.
Here live the parameter struct's mirror, the allocation of outputs and scratch memory, and the copies for tensors whose
layout the kernels cannot read (16-byte alignment).
"""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.bool: 3}
_ALIGNMENT_BYTES = 16
_MAX_STRIDE = 2**31 - 1  # from one position of a row to the next, elements; kernels keep it in 32 bits
_POINTERS = (
    *("q", "k", "v", "mask_bias", "pair_bias", "o", "lse"),
    *("d_o", "dq", "dk", "dv", "dpair_bias", "dmask_bias", "workspace", "stream"),
)
_ROW_STRIDES = ("q_stride", "k_stride", "v_stride", "d_o_stride")
_STRIDES = ("mask_stride_b", "mask_stride_n", "mask_stride_k", "pair_stride_b", "pair_stride_h", "pair_stride_q")
# Every path takes the same parameters and has four functions of its own; "sm90" is there if the GPUs were targeted.
_PREFIXES = {"sm80": "ds4sci_evoformer_", "sm90": "ds4sci_evoformer_sm90_"}
_INTS = (
    *("batch", "rows", "q_len", "k_len", "heads", "head_dim", "dtype", "mask_dtype", "pair_dtype"),
    *("mask_batch", "mask_rows", "pair_batch", "pair_heads", "dpair_splits"),
)


class _RowStrides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("b", "n", "l", "h")]


class _Params(ctypes.Structure):
    """Mirror of EvoformerParams in csrc/evoformer_attn/params.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, _RowStrides) for name in _ROW_STRIDES]
        + [(name, ctypes.c_int64) for name in _STRIDES]
        + [(name, ctypes.c_int32) for name in _INTS]
        + [("softmax_scale", ctypes.c_float)]
    )


class _EntryPoints:
    """The library's functions of one path.

    Raises:
        RuntimeError: the library was compiled without this path.
    """

    def __init__(self, library: ctypes.CDLL, file: Path, path: str):
        prefix = _PREFIXES[path]
        try:
            self.fwd = library[f"{prefix}fwd"]
            self.bwd = library[f"{prefix}bwd"]
            self.workspace_bytes = library[f"{prefix}workspace_bytes"]
            self.dpair_splits = library[f"{prefix}dpair_splits"]
        except AttributeError as error:
            raise RuntimeError(f"{file} was compiled without the {path} kernels: {error}") from error
        self.workspace_bytes.restype = ctypes.c_int64


class Extension:
    """The compiled Evoformer attention library.

    Args:
        path: the shared library that EvoformerAttnBuilder compiled.

    Raises:
        OSError: the library cannot be loaded.
        RuntimeError: it was compiled from other sources than this Python code expects.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._library = ctypes.CDLL(str(path))
        self._library.ds4sci_evoformer_params_size.restype = ctypes.c_int64
        self._library.ds4sci_evoformer_status_string.restype = ctypes.c_char_p
        size = self._library.ds4sci_evoformer_params_size()
        if size != ctypes.sizeof(_Params):
            raise RuntimeError(
                f"{path} takes parameters of {size} bytes, expected {ctypes.sizeof(_Params)}: it was compiled from "
                "another version of csrc/evoformer_attn; delete it to have it compiled again"
            )
        self._entry_points: dict[str, _EntryPoints] = {}

    def _of(self, path: str) -> _EntryPoints:
        """Looked up at the first call: a library for other GPUs has no "sm90"."""
        found = self._entry_points.get(path)
        if found is None:
            found = self._entry_points[path] = _EntryPoints(self._library, self.path, path)
        return found

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_bias: Tensor | None,
        pair_bias: Tensor | None,
        softmax_scale: float,
        path: str = "sm80",
    ) -> tuple[Tensor, Tensor]:
        """o [B, N, Lq, H, D] in q's dtype and lse [B, N, H, Lq] relative to the row maxima of the biases.

        lse is fp32; fp64 for fp32 problems, whose gradients would feel its rounding. `path`: whose kernels run,
        "sm80" or "sm90"; RuntimeError where the library was compiled without them.
        """
        head_dim = q.shape[-1]
        q, k, v = (_aligned_rows(x) for x in (q, k, v))
        batch, rows, q_len, heads, _ = q.shape
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((batch, rows, heads, q_len), dtype=_lse_dtype(q.dtype), device=q.device)
        pair_bias = _aligned_pair_bias(pair_bias)
        params = _make_params(q, k, v, mask_bias, pair_bias, o, lse, softmax_scale)
        self._run(self._of(path), params, q, backward=False)
        return _narrow(o, head_dim), lse

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_bias: Tensor | None,
        pair_bias: Tensor | None,
        o: Tensor,
        lse: Tensor,
        softmax_scale: float,
        wanted: tuple[bool, bool, bool, bool, bool],
        path: str = "sm80",
    ) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, dmask_bias, dpair_bias in the shapes and dtypes of their inputs; None where not wanted."""
        entry = self._of(path)
        head_dim = q.shape[-1]
        do, q, k, v = (_aligned_rows(x) for x in (do, q, k, v))
        o = _aligned_rows(o.contiguous())
        aligned_pair_bias = _aligned_pair_bias(pair_bias)
        params = _make_params(q, k, v, mask_bias, aligned_pair_bias, o, lse, softmax_scale)
        params.d_o = do.data_ptr()
        params.d_o_stride = _row_strides(do)

        def output(condition: bool, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=q.device) if condition else None

        batch, rows, q_len, heads, _ = q.shape
        k_len = k.shape[2]
        want_dq, want_dk, want_dv, want_dmask, want_dpair = wanted
        dq = output(want_dq, q.shape, q.dtype)
        dk = output(want_dk or want_dv, k.shape, k.dtype)
        dv = output(want_dk or want_dv, v.shape, v.dtype)
        dmask = output(want_dmask, (batch, rows, heads, k_len), torch.float32)
        dpair = None
        if want_dpair:
            params.dpair_splits = entry.dpair_splits(ctypes.byref(params), _num_sms(q.device))
            dpair = output(True, (params.dpair_splits, pair_bias.shape[0], heads, q_len, k_len), torch.float32)
        for name, tensor in (("dq", dq), ("dk", dk), ("dv", dv), ("dmask_bias", dmask), ("dpair_bias", dpair)):
            setattr(params, name, None if tensor is None else tensor.data_ptr())
        self._run(entry, params, q, backward=True)

        return (
            _narrow(dq, head_dim) if want_dq else None,
            _narrow(dk, head_dim) if want_dk else None,
            _narrow(dv, head_dim) if want_dv else None,
            _reduce_mask_gradient(dmask, mask_bias) if want_dmask else None,
            _reduce_pair_gradient(dpair, pair_bias) if want_dpair else None,
        )

    def attention(self, q, k, v, bias1, bias2, o, lse) -> None:
        """DeepSpeed's forward entry point: writes o and lse [B * N, H, Lq rounded up to 32]; an empty bias is none."""
        out, out_lse = self.forward(*_five_axes(q, k, v), _present(bias1), _present(bias2), q.shape[-1] ** -0.5)
        o.copy_(out.view_as(o))
        q_len = q.shape[-3]
        lse[..., :q_len].copy_(out_lse.view(-1, q.shape[-2], q_len))

    def attention_bwd(self, do, q, k, v, o, lse, delta, bias1, bias2, dq, dk, dv, db1, db2) -> None:
        """DeepSpeed's backward entry point: writes dq, dk, dv, and db1, db2 unless empty. `delta` stays unused."""
        do5, q5, k5, v5, o5 = _five_axes(do, q, k, v, o)
        q_len = q.shape[-3]
        lse = lse[..., :q_len].reshape(*q5.shape[:2], q.shape[-2], q_len).to(_lse_dtype(q.dtype)).contiguous()
        wanted = (True, True, True, db1.numel() > 0, db2.numel() > 0)
        gradients = self.backward(
            do5, q5, k5, v5, _present(bias1), _present(bias2), o5, lse, q.shape[-1] ** -0.5, wanted
        )
        for destination, gradient in zip((dq, dk, dv, db1, db2), gradients, strict=True):
            if gradient is not None:
                destination.copy_(gradient.view_as(destination))

    def _run(self, entry: _EntryPoints, params: _Params, like: Tensor, *, backward: bool) -> None:
        function = entry.bwd if backward else entry.fwd
        size = entry.workspace_bytes(ctypes.byref(params), int(backward))
        workspace = torch.empty(size, dtype=torch.uint8, device=like.device)
        params.workspace = workspace.data_ptr()
        if like.is_cuda:
            params.stream = torch.cuda.current_stream(like.device).cuda_stream
            if like.device.index == torch.cuda.current_device():
                status = function(ctypes.byref(params))
            else:
                with torch.cuda.device(like.device):
                    status = function(ctypes.byref(params))
        else:  # the library of the tests' emulator
            status = function(ctypes.byref(params))
        if status != 0:
            reason = self._library.ds4sci_evoformer_status_string(status).decode()
            raise RuntimeError(
                f"Evoformer attention kernel failed: {reason} (status {status}), q {tuple(like.shape)} {like.dtype}"
            )


def _make_params(q, k, v, mask_bias, pair_bias, o, lse, softmax_scale) -> _Params:
    batch, rows, q_len, heads, head_dim = q.shape
    params = _Params(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        o=o.data_ptr(),
        lse=lse.data_ptr(),
        q_stride=_row_strides(q),
        k_stride=_row_strides(k),
        v_stride=_row_strides(v),
        batch=batch,
        rows=rows,
        q_len=q_len,
        k_len=k.shape[2],
        heads=heads,
        head_dim=head_dim,
        dtype=_DTYPE_CODES[q.dtype],
        dpair_splits=1,
        softmax_scale=softmax_scale,
    )
    if mask_bias is not None:
        params.mask_bias = mask_bias.data_ptr()
        params.mask_dtype = _DTYPE_CODES[mask_bias.dtype]
        params.mask_batch, params.mask_rows = mask_bias.shape[:2]
        params.mask_stride_b, params.mask_stride_n, _, _, params.mask_stride_k = mask_bias.stride()
    if pair_bias is not None:
        params.pair_bias = pair_bias.data_ptr()
        params.pair_dtype = _DTYPE_CODES[pair_bias.dtype]
        params.pair_batch, params.pair_heads = pair_bias.shape[0], pair_bias.shape[2]
        params.pair_stride_b, _, params.pair_stride_h, params.pair_stride_q, _ = pair_bias.stride()
    return params


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def _row_strides(x: Tensor) -> _RowStrides:
    return _RowStrides(*x.stride()[:4])


def _is_aligned(x: Tensor) -> bool:
    """Whether every row of the last axis is contiguous and starts at a multiple of 16 bytes."""
    *outer, last = x.stride()
    if last != 1 and x.shape[-1] > 1:
        return False
    # One test for all strides at once: this runs for every tensor of every call.
    bits = x.data_ptr()
    size = x.element_size()
    for stride in outer:
        bits |= stride * size
    if bits % _ALIGNMENT_BYTES == 0:
        return True
    aligned = all(
        n == 1 or stride * size % _ALIGNMENT_BYTES == 0 for n, stride in zip(x.shape[:-1], outer, strict=True)
    )
    return aligned and x.data_ptr() % _ALIGNMENT_BYTES == 0


def _aligned_rows(x: Tensor) -> Tensor:
    """x, or a copy whose head dim is padded with zeros to a multiple of 16 bytes."""
    elements = _ALIGNMENT_BYTES // x.element_size()
    if x.shape[-1] % elements != 0:
        return F.pad(x, (0, -x.shape[-1] % elements))
    return x if _is_aligned(x) and x.stride(2) <= _MAX_STRIDE else x.contiguous()


def _aligned_pair_bias(pair_bias: Tensor | None) -> Tensor | None:
    """pair_bias, or a copy whose rows start at multiples of 16 bytes and hold whole 16 bytes: kernels read those."""
    if pair_bias is None:
        return None
    *leading, k_len = pair_bias.shape
    padding = -k_len % (_ALIGNMENT_BYTES // pair_bias.element_size())
    if padding == 0 and _is_aligned(pair_bias):
        return pair_bias
    # The padding is read, not used; zeros, so that no tool takes it for a mistake.
    copy = pair_bias.new_zeros(*leading, k_len + padding)[..., :k_len]
    return copy.copy_(pair_bias)


def _narrow(x: Tensor, head_dim: int) -> Tensor:
    return x if x.shape[-1] == head_dim else x[..., :head_dim].contiguous()


def _reduce_mask_gradient(dmask: Tensor, mask_bias: Tensor) -> Tensor:
    """[B, N, H, Lk] fp32 -> the mask's shape and dtype."""
    dmask = dmask.sum(dim=2)  # [B, N, Lk]
    summed = [axis for axis in (0, 1) if mask_bias.shape[axis] == 1 and dmask.shape[axis] > 1]
    if summed:
        dmask = dmask.sum(dim=summed, keepdim=True)
    return dmask.to(mask_bias.dtype)[:, :, None, None, :]


def _reduce_pair_gradient(dpair: Tensor, pair_bias: Tensor) -> Tensor:
    """[splits, B|1, H, Lq, Lk] fp32 -> the pair bias's shape and dtype."""
    dpair = dpair.sum(dim=0) if dpair.shape[0] > 1 else dpair[0]
    if pair_bias.shape[2] == 1 and dpair.shape[1] > 1:
        dpair = dpair.sum(dim=1, keepdim=True)
    return dpair.to(pair_bias.dtype)[:, None]


def _five_axes(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.reshape(-1, *x.shape[-4:]) if x.dim() > 4 else x[(None,) * (5 - x.dim())] for x in tensors)


def _present(bias: Tensor) -> Tensor | None:
    return bias if bias.numel() > 0 else None


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def extension() -> Extension:
    """The library of this process, compiled on first use.

    Raises whatever the op builder raises when it cannot compile; the message says what is missing.
    """
    # Imported here: the builder imports DeepSpeed, which an import of this package must not.
    from deepspeed_ds4sci.op_builder.evoformer_attn import EvoformerAttnBuilder

    return EvoformerAttnBuilder().load()

# SPDX-License-Identifier: Apache-2.0
"""The compiled library behind a Python face: torch tensors in, torch tensors out.

The library is plain C (csrc/evoformer_attn/params.h) and knows nothing of torch, so another torch needs no rebuild.
Here outputs and scratch memory are allocated; `_layout` copies what the kernels cannot read. Small problems take the
host longer than the kernels, so whatever follows from sizes, strides and dtypes is worked out once and kept as a
`_Plan`; a call adds the addresses.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import _layout
from ._params import POINTERS, Layout, Params, RowStrides, layout_of, lse_dtype, make_params, with_addresses

_KEPT_PLANS = 4096  # about 2 KiB each
_SOME_ADDRESS = 256  # a multiple of every alignment
# Every path takes the same parameters and has four functions of its own; "sm90" is there if the GPUs were targeted.
_PREFIXES = {"sm80": "ds4sci_evoformer_", "sm90": "ds4sci_evoformer_sm90_"}
_READ_BY_COPY_ENGINE = {"sm80": False, "sm90": True}
# Whose d(pair_bias) kernel writes the rounded result by itself where there is one share of the rows.
_ROUNDS_AN_ONLY_SHARE = {"sm80": False, "sm90": True}


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
        self.fwd.argtypes = self.bwd.argtypes = (ctypes.POINTER(Params),)
        self.workspace_bytes.argtypes = self.dpair_splits.argtypes = (ctypes.POINTER(Params), ctypes.c_int32)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What every call with the same sizes, strides, dtypes, device and scale has in common."""

    functions: _EntryPoints
    params: Params  # all but the addresses, which are null
    readable: bool  # at aligned addresses the kernels can read the tensors as they are
    workspace_bytes: int
    lse_dtype: torch.dtype
    lse_shape: tuple[int, ...]  # [B, N, H, Lq]
    dmask_shape: tuple[int, ...]  # [B, N, H, Lk]
    # fp32 sums [B|1, 1, H, Lq, Lk], after an axis of shares of the rows if there are several; None: no need of them
    dpair_shape: tuple[int, ...] | None
    finishes_dpair: bool  # the library adds up the shares and rounds, or needs none; else torch does it


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
        if size != ctypes.sizeof(Params):
            raise RuntimeError(
                f"{path} takes parameters of {size} bytes, expected {ctypes.sizeof(Params)}: it was compiled from "
                "another version of csrc/evoformer_attn; delete it to have it compiled again"
            )
        self._entry_points: dict[str, _EntryPoints] = {}
        self._plan = functools.lru_cache(maxsize=_KEPT_PLANS)(self._make_plan)

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
        gate: Tensor | None,
        softmax_scale: float,
        path: str = "sm80",
    ) -> tuple[Tensor, Tensor]:
        """o [B, N, Lq, H, D] in q's dtype, gated, and lse [B, N, H, Lq] relative to the row maxima of the biases.

        lse is fp32; fp64 for fp32 problems, whose gradients would feel its rounding. `path`: whose kernels run,
        "sm80" or "sm90"; RuntimeError where the library was compiled without them.
        """
        plan = self._plan(layout_of(q, k, v, mask_bias, pair_bias, gate, softmax_scale), path)
        if plan.readable and _layout.addresses_are_aligned(q, k, v, pair_bias, gate):
            return self._forward(plan, q, k, v, mask_bias, pair_bias, gate)
        head_dim, by_copy_engine = q.shape[-1], _READ_BY_COPY_ENGINE[path]
        q, k, v = (_layout.readable_rows(x, by_copy_engine) for x in (q, k, v))
        pair_bias = _layout.readable_pair_bias(pair_bias, by_copy_engine)
        gate = None if gate is None else _layout.readable_rows(gate)
        plan = self._plan(layout_of(q, k, v, mask_bias, pair_bias, gate, softmax_scale), path)
        o, lse = self._forward(plan, q, k, v, mask_bias, pair_bias, gate)
        return _layout.narrow(o, head_dim), lse

    def _forward(self, plan: _Plan, q, k, v, mask_bias, pair_bias, gate) -> tuple[Tensor, Tensor]:
        o = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(plan.lse_shape, dtype=plan.lse_dtype, device=q.device)
        params = with_addresses(plan.params, q, k, v, mask_bias, pair_bias, gate, o, lse)
        self._run(plan.functions.fwd, plan, params, q)
        return o, lse

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_bias: Tensor | None,
        pair_bias: Tensor | None,
        gate: Tensor | None,
        o: Tensor,
        lse: Tensor,
        softmax_scale: float,
        wanted: tuple[bool, bool, bool, bool, bool, bool],
        path: str = "sm80",
    ) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, dmask_bias, dpair_bias, dgate, shaped and typed as their inputs; None where not wanted."""
        of_backward = (do.stride(), o.is_contiguous(), wanted)
        plan = self._plan(layout_of(q, k, v, mask_bias, pair_bias, gate, softmax_scale), path, of_backward)
        if plan.readable and _layout.addresses_are_aligned(do, q, k, v, pair_bias, gate, o):
            return self._backward(plan, do, q, k, v, mask_bias, pair_bias, gate, o, lse, wanted)
        head_dim, by_copy_engine = q.shape[-1], _READ_BY_COPY_ENGINE[path]
        do, q, k, v, o = (_layout.readable_rows(x, by_copy_engine) for x in (do, q, k, v, o.contiguous()))
        pair_bias = _layout.readable_pair_bias(pair_bias, by_copy_engine)
        gate = None if gate is None else _layout.readable_rows(gate)
        of_backward = (do.stride(), True, wanted)
        plan = self._plan(layout_of(q, k, v, mask_bias, pair_bias, gate, softmax_scale), path, of_backward)
        dq, dk, dv, *of_biases, dgate = self._backward(plan, do, q, k, v, mask_bias, pair_bias, gate, o, lse, wanted)
        dq, dk, dv, dgate = (_layout.narrow(x, head_dim) for x in (dq, dk, dv, dgate))
        return (dq, dk, dv, *of_biases, dgate)

    def _backward(
        self, plan: _Plan, do, q, k, v, mask_bias, pair_bias, gate, o, lse, wanted
    ) -> tuple[Tensor | None, ...]:
        params = with_addresses(plan.params, q, k, v, mask_bias, pair_bias, gate, o, lse)
        params.d_o = do.data_ptr()
        want_dq, want_dk, want_dv, want_dmask, want_dpair, want_dgate = wanted
        dq = dk = dv = dmask = dpair = shares = dgate = None
        if want_dq:
            dq = torch.empty_like(q, memory_format=torch.contiguous_format)
            params.dq = dq.data_ptr()
        if want_dk or want_dv:
            dk = torch.empty_like(k, memory_format=torch.contiguous_format)
            dv = torch.empty_like(v, memory_format=torch.contiguous_format)
            params.dk, params.dv = dk.data_ptr(), dv.data_ptr()
        if want_dmask:
            dmask = torch.empty(plan.dmask_shape, dtype=torch.float32, device=q.device)
            params.dmask_bias = dmask.data_ptr()
        if want_dpair:
            if plan.dpair_shape is not None:
                shares = torch.empty(plan.dpair_shape, dtype=torch.float32, device=q.device)
                params.dpair_bias = shares.data_ptr()
            if plan.finishes_dpair:
                dpair = torch.empty(pair_bias.shape, dtype=pair_bias.dtype, device=q.device)
                params.dpair_out = dpair.data_ptr()
        if want_dgate:
            dgate = torch.empty_like(q, memory_format=torch.contiguous_format)
            params.d_gate = dgate.data_ptr()
        self._run(plan.functions.bwd, plan, params, q)
        return (
            dq,
            dk if want_dk else None,
            dv if want_dv else None,
            _reduce_mask_gradient(dmask, mask_bias) if want_dmask else None,
            _reduce_pair_gradient(shares, pair_bias) if want_dpair and not plan.finishes_dpair else dpair,
            dgate,
        )

    def attention(self, q, k, v, bias1, bias2, o, lse) -> None:
        """DeepSpeed's forward entry point: writes o and lse [B * N, H, Lq rounded up to 32]; an empty bias is none."""
        out, out_lse = self.forward(*_five_axes(q, k, v), _present(bias1), _present(bias2), None, q.shape[-1] ** -0.5)
        o.copy_(out.view_as(o))
        q_len = q.shape[-3]
        lse[..., :q_len].copy_(out_lse.view(-1, q.shape[-2], q_len))

    def attention_bwd(self, do, q, k, v, o, lse, delta, bias1, bias2, dq, dk, dv, db1, db2) -> None:
        """DeepSpeed's backward entry point: writes dq, dk, dv, and db1, db2 unless empty. `delta` stays unused."""
        do5, q5, k5, v5, o5 = _five_axes(do, q, k, v, o)
        q_len = q.shape[-3]
        lse = lse[..., :q_len].reshape(*q5.shape[:2], q.shape[-2], q_len).to(lse_dtype(q.dtype)).contiguous()
        wanted = (True, True, True, db1.numel() > 0, db2.numel() > 0, False)
        *gradients, _ = self.backward(
            do5, q5, k5, v5, _present(bias1), _present(bias2), None, o5, lse, q.shape[-1] ** -0.5, wanted
        )
        for destination, gradient in zip((dq, dk, dv, db1, db2), gradients, strict=True):
            if gradient is not None:
                destination.copy_(gradient.view_as(destination))

    def _make_plan(
        self, layout: Layout, path: str, of_backward: tuple[tuple[int, ...], bool, tuple[bool, ...]] | None = None
    ) -> _Plan:
        """of_backward: do's stride, whether o is contiguous, and which gradients are wanted."""
        functions = self._of(path)
        batch, rows, q_len, heads, _ = layout.q_shape
        k_len = layout.k_shape[2]
        params = make_params(layout)
        # Sizes depend on which tensors are there, not on where: any address will do.
        optional = {"mask_bias": layout.mask, "pair_bias": layout.pair, "gate": layout.gate_stride}
        present = ["q", "k", "v", "o", "lse", *(name for name, given in optional.items() if given is not None)]
        _point(params, present, _SOME_ADDRESS)
        dpair_shape, finishes_dpair = None, False
        if of_backward is not None:
            do_stride, _, (want_dq, want_dk, want_dv, want_dmask, want_dpair, _) = of_backward
            params.d_o_stride = RowStrides(*do_stride[:4])
            outputs = {"dq": want_dq, "dk": want_dk or want_dv, "dmask_bias": want_dmask, "dpair_bias": want_dpair}
            _point(params, ["d_o", *(name for name, is_wanted in outputs.items() if is_wanted)], _SOME_ADDRESS)
            params.dv = params.dk
            if want_dpair:
                params.dpair_splits = functions.dpair_splits(params, _num_sms(layout.device))
                several = params.dpair_splits > 1
                # A bias that all heads share needs their sum, and an only share in fp32 is the result.
                finishes_dpair = layout.pair.shape[2] == heads and (several or layout.pair.dtype != torch.float32)
                if several or not finishes_dpair or not _ROUNDS_AN_ONLY_SHARE[path]:
                    shares = (params.dpair_splits,) if several else ()
                    dpair_shape = (*shares, layout.pair.shape[0], 1, heads, q_len, k_len)
        # It depends on how many multiprocessors the tensors' GPU has, which need not be the current one.
        with torch.cuda.device(layout.device) if layout.device.type == "cuda" else contextlib.nullcontext():
            workspace_bytes = functions.workspace_bytes(params, int(of_backward is not None))
        _point(params, POINTERS, None)
        return _Plan(
            functions,
            params,
            _is_readable(layout, of_backward, _READ_BY_COPY_ENGINE[path]),
            workspace_bytes,
            lse_dtype(layout.dtype),
            lse_shape=(batch, rows, heads, q_len),
            dmask_shape=(batch, rows, heads, k_len),
            dpair_shape=dpair_shape,
            finishes_dpair=finishes_dpair,
        )

    def _run(self, function, plan: _Plan, params: Params, like: Tensor) -> None:
        device = like.device
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
        params.workspace = workspace.data_ptr()
        if like.is_cuda:
            # What torch.cuda.current_stream() and current_device() end in, without their objects.
            params.stream = torch._C._cuda_getCurrentRawStream(device.index)
            if device.index == torch._C._cuda_getDevice():
                status = function(params)
            else:
                with torch.cuda.device(device):
                    status = function(params)
        else:  # the library of the tests' emulator
            status = function(params)
        if status != 0:
            reason = self._library.ds4sci_evoformer_status_string(status).decode()
            raise RuntimeError(
                f"Evoformer attention kernel failed: {reason} (status {status}), q {tuple(like.shape)} {like.dtype}"
            )


def _point(params: Params, names: Iterable[str], address: int | None) -> None:
    for name in names:
        setattr(params, name, address)


def _is_readable(layout: Layout, of_backward: tuple | None, by_copy_engine: bool) -> bool:
    read = [(layout.q_shape, layout.q_stride), (layout.k_shape, layout.k_stride), (layout.k_shape, layout.v_stride)]
    if of_backward is not None:
        do_stride, o_is_contiguous, _ = of_backward
        if not o_is_contiguous:
            return False
        read.append((layout.q_shape, do_stride))
    if layout.pair is not None and not _layout.is_readable(*layout.pair, by_copy_engine):
        return False
    # Hopper's kernels, too, read the gate themselves.
    if layout.gate_stride is not None and not _layout.rows_are_readable(
        layout.q_shape, layout.gate_stride, layout.dtype
    ):
        return False
    return all(_layout.rows_are_readable(shape, stride, layout.dtype, by_copy_engine) for shape, stride in read)


def _reduce_mask_gradient(dmask: Tensor, mask_bias: Tensor) -> Tensor:
    """[B, N, H, Lk] fp32 -> the mask's shape and dtype."""
    axes = [axis for axis in (0, 1) if mask_bias.shape[axis] == 1 and dmask.shape[axis] > 1]
    dmask = dmask.sum(dim=(*axes, 2), keepdim=True)  # [B|1, N|1, 1, Lk]
    return dmask.to(mask_bias.dtype).unsqueeze(2)


def _reduce_pair_gradient(dpair: Tensor, pair_bias: Tensor) -> Tensor:
    """`_Plan.dpair_shape`, fp32 -> the pair bias's shape and dtype."""
    if dpair.dim() > pair_bias.dim():
        dpair = dpair.sum(dim=0)
    if pair_bias.shape[2] == 1 and dpair.shape[2] > 1:
        dpair = dpair.sum(dim=2, keepdim=True)
    return dpair if dpair.dtype == pair_bias.dtype else dpair.to(pair_bias.dtype)


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


@functools.cache
def missing_reason(path: str) -> str | None:
    """None once the library of this process is loaded and has the kernels of `path`, else why not. Compiles on first
    use."""
    try:
        extension()._of(path)
    except Exception as error:  # whatever goes wrong in a compiler run becomes the reason that the caller reads
        return f"its compiled library is not available: {error}"
    return None

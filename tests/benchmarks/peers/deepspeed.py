# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own Evoformer attention: its Python wrapper, unchanged, on a library made by `prepare_peers.py`."""

import ctypes
import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks.case import Case, Inputs
from tests.benchmarks.peers.base import Call, Peer, leaf, only_on_cuda, wanted_leaves

LIBRARIES = Path(__file__).resolve().parents[3] / ".peers"
_DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int64)


class _Tensor(ctypes.Structure):
    """Same layout as `torch::Tensor` in deepspeed_op/stand_in/torch/extension.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 5),
        ("strides", ctypes.c_int64 * 5),
        ("dtype", ctypes.c_int64),
    ]


def _describe(tensors: tuple[Tensor, ...]) -> ctypes.Array:
    described = (_Tensor * len(tensors))()
    for entry, tensor in zip(described, tensors, strict=True):
        entry.data = tensor.data_ptr()
        entry.dims = tensor.dim()
        entry.sizes[: tensor.dim()] = tensor.shape
        entry.strides[: tensor.dim()] = tensor.stride()
        entry.dtype = _DTYPE_CODES[tensor.dtype]
    return described


class Kernels:
    """The module that DeepSpeed's op builder would return: `attention` and `attention_bwd` on torch tensors."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        self._forward = library.deepspeed_attention
        self._backward = library.deepspeed_attention_bwd
        self._forward.restype = self._backward.restype = ctypes.c_char_p
        self._backward.argtypes = [ctypes.POINTER(_Tensor), _ALLOCATE]

    def attention(self, *tensors: Tensor) -> None:
        """q, k, v, bias1, bias2, o, lse."""
        self._check(self._forward(_describe(tensors)))

    def attention_bwd(self, *tensors: Tensor) -> None:
        """do, q, k, v, o, lse, delta, bias1, bias2, dq, dk, dv, dbias1, dbias2."""
        workspace = []

        def allocate(size: int) -> int:
            workspace.append(torch.empty(size, dtype=torch.uint8, device=tensors[0].device))
            return workspace[0].data_ptr()

        # The workspace may be freed at return, like a torch tensor in C++: the stream orders its next use.
        self._check(self._backward(_describe(tensors), _ALLOCATE(allocate)))

    @staticmethod
    def _check(message: bytes | None) -> None:
        if message is not None:
            raise RuntimeError(f"DeepSpeed's op: {message.decode()}")


def _library(dtype: str) -> Path | None:
    return next(iter(sorted(LIBRARIES.glob(f"libdeepspeed_evoformer_{dtype}_sm*.so"))), None)


def has_library(dtype: str) -> bool:
    return _library(dtype) is not None


@functools.cache
def own_attention(dtype: str):
    """DeepSpeed's `DS4Sci_EvoformerAttention`, out of its file: its import path may give this project's op."""
    package = importlib.util.find_spec("deepspeed")
    file = Path(package.origin).parent / "ops" / "deepspeed4science" / "evoformer_attn.py"
    spec = importlib.util.spec_from_file_location(f"_deepspeed_own_evoformer_attn_{dtype}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.kernel_ = Kernels(_library(dtype))
    return module.DS4Sci_EvoformerAttention


class DeepSpeed(Peer):
    name = "deepspeed"
    graph_reason = "launches on the legacy default stream"

    def unavailable_reason(self, device_type: str) -> str | None:
        if importlib.util.find_spec("deepspeed") is None:
            return "pip install deepspeed"
        if not any(LIBRARIES.glob("libdeepspeed_evoformer_*.so")):
            return "python -m tests.benchmarks.prepare_peers library"
        return only_on_cuda(device_type)

    def refused_reason(self, case: Case) -> str | None:
        if case.q_len != case.k_len:
            return "Lq = Lk only"
        if case.q_len <= 16:
            return "L > 16 only"
        if case.batch * case.rows > 65535:
            return "B * N <= 65535 only"
        if case.head_dim > 64:
            return "head dim <= 64 only"
        if not has_library(case.dtype):
            return f"library not prepared for {case.dtype}"
        return None

    def bind(self, case: Case, inputs: Inputs) -> Call:
        attention = own_attention(case.dtype)
        q, k, v = leaf(inputs.q), leaf(inputs.k), leaf(inputs.v)
        mask_bias = inputs.mask_bias()
        pair_bias = None if inputs.pair_bias is None else leaf(inputs.pair_bias)
        return Call(
            lambda: attention(q, k, v, [mask_bias, pair_bias]),
            wanted_leaves(case, q, k, v, pair_bias),
            inputs.do.clone(),
        )


DEEPSPEED = DeepSpeed()

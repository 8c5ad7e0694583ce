# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's cuEquivariance (PyPI `cuequivariance-torch` with `cuequivariance-ops-torch-cu13`), closed kernels."""

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.benchmarks.case import Case, Inputs
from tests.benchmarks.peers.base import Call, Peer, leaf, only_on_cuda, wanted_leaves


def load_nvrtc() -> None:
    """Its libraries need libnvrtc but do not say where; torch loads the one in the nvidia wheels only on demand."""
    for path in (found for folder in sys.path for found in Path(folder).glob("nvidia/*/lib/libnvrtc.so.1?")):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


class CuEquivariance(Peer):
    name = "cueq"

    def unavailable_reason(self, device_type: str) -> str | None:
        if find_spec("cuequivariance_torch") is None or find_spec("cuequivariance_ops_torch") is None:
            return "pip install cuequivariance-torch cuequivariance-ops-torch-cu13"
        return only_on_cuda(device_type)

    def refused_reason(self, case: Case) -> str | None:
        if not case.pair:
            return "needs a pair bias"
        if case.head_dim % 8:
            return "falls back to eager PyTorch unless the head dim is a multiple of 8"
        return None

    def bind(self, case: Case, inputs: Inputs) -> Call:
        # Read when the package is imported: without it, lengths up to 100 run eager PyTorch silently.
        os.environ.setdefault("CUEQ_TRIATTN_FALLBACK_THRESHOLD", "0")
        load_nvrtc()
        from cuequivariance_torch import triangle_attention

        q, k, v = (leaf(x.transpose(2, 3)) for x in (inputs.q, inputs.k, inputs.v))  # [B, N, H, L, D]
        pair_bias = leaf(inputs.pair_bias)
        mask = None if inputs.keep is None else inputs.keep[:, :, None, None, :]
        return Call(
            lambda: triangle_attention(q, k, v, pair_bias, mask=mask),
            wanted_leaves(case, q, k, v, pair_bias),
            inputs.do.transpose(2, 3).contiguous(),
            lambda name, tensor: tensor if name == "pair_bias" else tensor.transpose(2, 3),
        )


CUEQUIVARIANCE = CuEquivariance()

# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's inference runtime (PyPI `bionemo-ir`): forward only, masks that keep a prefix of the keys."""

from importlib.util import find_spec

import torch

from tests.benchmarks.case import Case, Inputs
from tests.benchmarks.peers.base import Call, Peer, only_on_cuda


class BionemoIr(Peer):
    name = "bionemo_ir"
    has_backward = False

    def unavailable_reason(self, device_type: str) -> str | None:
        if find_spec("bionemo_ir") is None:
            return "pip install bionemo-ir"
        return only_on_cuda(device_type)

    def refused_reason(self, case: Case) -> str | None:
        if case.mask != "none":
            return "prefix masks only"
        if not case.pair or case.q_len != case.k_len:
            return "triangle attention only"
        if case.dtype not in ("bf16", "fp16"):
            return "16-bit only"
        return None

    def bind(self, case: Case, inputs: Inputs) -> Call:
        from bionemo_ir._torch.attention_backend.triangle_attention.cutedsl import TriangleAttentionCuTeLeftMask

        attention = TriangleAttentionCuTeLeftMask(0, case.heads, case.head_dim)
        q, k, v = (x.contiguous() for x in (inputs.q, inputs.k, inputs.v))  # [B, N, L, H, D]
        pair_bias = inputs.pair_bias[:, 0].contiguous()  # [B, H, L, L]
        lengths = torch.full((case.batch, case.rows), case.k_len, dtype=torch.int32, device=q.device)
        return Call(lambda: attention.forward(q, k, v, [lengths, pair_bias]), {}, inputs.do)


BIONEMO_IR = BionemoIr()

# SPDX-License-Identifier: Apache-2.0
"""TriFast (PyPI `trifast`): Triton triangle attention, square shapes, with a boolean mask."""

from importlib.util import find_spec

from tests.benchmarks.case import Case, Inputs
from tests.benchmarks.peers.base import Call, Peer, leaf, only_on_cuda, wanted_leaves


class TriFast(Peer):
    name = "trifast"

    def unavailable_reason(self, device_type: str) -> str | None:
        if find_spec("trifast") is None:
            return "pip install trifast"
        return only_on_cuda(device_type)

    def refused_reason(self, case: Case) -> str | None:
        if not case.rows == case.q_len == case.k_len:
            return "square shapes only (N = Lq = Lk)"
        if not case.pair:
            return "needs a pair bias"
        if case.head_dim & (case.head_dim - 1):
            return "head dim must be a power of two"
        return None

    def bind(self, case: Case, inputs: Inputs) -> Call:
        from trifast import triangle_attention

        q, k, v = (leaf(x.movedim(3, 1)) for x in (inputs.q, inputs.k, inputs.v))  # [B, H, N, L, D]
        pair_bias = leaf(inputs.pair_bias[:, 0])  # [B, H, L, L]
        nothing = q.new_zeros(case.batch, case.rows, case.k_len, dtype=bool)
        drop = nothing if inputs.keep is None else ~inputs.keep
        return Call(
            lambda: triangle_attention(q, k, v, pair_bias, drop),
            wanted_leaves(case, q, k, v, pair_bias),
            inputs.do.movedim(3, 1).contiguous(),
            lambda name, tensor: tensor[:, None] if name == "pair_bias" else tensor.movedim(1, 3),
        )


TRIFAST = TriFast()

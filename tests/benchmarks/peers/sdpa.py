# SPDX-License-Identifier: Apache-2.0
"""torch's scaled_dot_product_attention; it takes the biases only as one dense tensor [B * N, H, Lq, Lk]."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.benchmarks.case import Case, Inputs
from tests.benchmarks.peers.base import Call, Peer, leaf, wanted_leaves


class Sdpa(Peer):
    name = "sdpa"

    def bind(self, case: Case, inputs: Inputs) -> Call:
        q, k, v = (leaf(x.flatten(0, 1).transpose(1, 2)) for x in (inputs.q, inputs.k, inputs.v))  # [B * N, H, L, D]
        mask_bias = inputs.mask_bias()
        pair_bias = None if inputs.pair_bias is None else leaf(inputs.pair_bias)
        dense = (case.batch, case.rows, case.heads, case.q_len, case.k_len)

        def forward() -> torch.Tensor:
            terms = [bias for bias in (mask_bias, pair_bias) if bias is not None]
            bias = None
            if terms:
                bias = (sum(terms) if len(terms) == 2 else terms[0]).expand(dense).flatten(0, 1)
            return scaled_dot_product_attention(q, k, v, attn_mask=bias)

        return Call(
            forward,
            wanted_leaves(case, q, k, v, pair_bias),
            inputs.do.flatten(0, 1).transpose(1, 2).contiguous(),
            lambda name, t: t if name == "pair_bias" else t.transpose(1, 2).unflatten(0, dense[:2]),
        )


SDPA = Sdpa()

# SPDX-License-Identifier: Apache-2.0
"""torch's FlexAttention, compiled, with both biases captured by the score function."""

import torch
from torch.nn.attention.flex_attention import flex_attention

from tests.benchmarks.case import Case, Inputs
from tests.benchmarks.peers.base import Call, Peer, leaf, only_on_cuda, wanted_leaves


def compiled_flex_attention():
    """Compiled anew for each case: past torch's limit of recompilations it would silently run uncompiled."""
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


class Flex(Peer):
    name = "flex"

    def unavailable_reason(self, device_type: str) -> str | None:
        return only_on_cuda(device_type)

    def bind(self, case: Case, inputs: Inputs) -> Call:
        q, k, v = (leaf(x.flatten(0, 1).transpose(1, 2)) for x in (inputs.q, inputs.k, inputs.v))  # [B * N, H, L, D]
        pair_bias = None if inputs.pair_bias is None else leaf(inputs.pair_bias)
        mask_bias = inputs.mask_bias()
        mask = None if mask_bias is None else mask_bias.reshape(case.batch * case.rows, case.k_len).contiguous()
        rows = case.rows
        if case.batch == 1:  # spares every logit an integer division

            def pair_at(b, h, i, j):
                return pair_bias[0, 0, h, i, j]
        else:

            def pair_at(b, h, i, j):
                return pair_bias[b // rows, 0, h, i, j]

        # One score function per set of biases: a branch inside it would be traced for every logit.
        if mask is not None and pair_bias is not None:

            def score_mod(score, b, h, i, j):
                return score + pair_at(b, h, i, j) + mask[b, j]
        elif pair_bias is not None:

            def score_mod(score, b, h, i, j):
                return score + pair_at(b, h, i, j)
        elif mask is not None:

            def score_mod(score, b, h, i, j):
                return score + mask[b, j]
        else:
            score_mod = None

        attention = compiled_flex_attention()
        return Call(
            lambda: attention(q, k, v, score_mod=score_mod),
            wanted_leaves(case, q, k, v, pair_bias),
            inputs.do.flatten(0, 1).transpose(1, 2).contiguous(),
            lambda name, t: t if name == "pair_bias" else t.transpose(1, 2).unflatten(0, (case.batch, case.rows)),
        )


FLEX = Flex()

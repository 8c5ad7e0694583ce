# SPDX-License-Identifier: Apache-2.0
"""torch's FlexAttention, compiled, with both biases captured by the score function."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from tests.benchmarks.case import Case, Inputs
from tests.benchmarks.peers.base import Call, Peer, leaf, only_on_cuda, wanted_leaves


def compiled_flex_attention():
    """Compiled anew for each case: past torch's limit of recompilations it would silently run uncompiled."""
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


def score_function(pair_bias: Tensor | None, mask: Tensor | None, rows: int):
    """What flex_attention adds to a logit; None for nothing.

    Args:
        pair_bias: [H, Lq, Lk] or [B, H, Lq, Lk]; mask: [B * N, Lk]; rows: N.
    """

    def both(score, b, h, i, j):
        return score + pair_bias[h, i, j] + mask[b, j]

    def both_of_batch(score, b, h, i, j):
        return score + pair_bias[b // rows, h, i, j] + mask[b, j]

    def pair_only(score, b, h, i, j):
        return score + pair_bias[h, i, j]

    def pair_only_of_batch(score, b, h, i, j):
        return score + pair_bias[b // rows, h, i, j]

    def mask_only(score, b, h, i, j):
        return score + mask[b, j]

    if pair_bias is None:
        return None if mask is None else mask_only
    if pair_bias.dim() == 3:  # B = 1, which spares every logit an integer division
        return pair_only if mask is None else both
    return pair_only_of_batch if mask is None else both_of_batch


class Flex(Peer):
    name = "flex"

    def unavailable_reason(self, device_type: str) -> str | None:
        return only_on_cuda(device_type)

    def bind(self, case: Case, inputs: Inputs) -> Call:
        q, k, v = (leaf(x.flatten(0, 1).transpose(1, 2)) for x in (inputs.q, inputs.k, inputs.v))  # [B * N, H, L, D]
        pair_bias = None if inputs.pair_bias is None else leaf(inputs.pair_bias.squeeze(1).squeeze(0))
        mask_bias = inputs.mask_bias()
        mask = None if mask_bias is None else mask_bias.reshape(case.batch * case.rows, case.k_len).contiguous()
        attention = compiled_flex_attention()
        score_mod = score_function(pair_bias, mask, case.rows)

        pair_shape = None if pair_bias is None else inputs.pair_bias.shape

        def canonical(name, tensor):
            if name == "pair_bias":
                return tensor.view(pair_shape)
            return tensor.transpose(1, 2).unflatten(0, (case.batch, case.rows))

        return Call(
            lambda: attention(q, k, v, score_mod=score_mod),
            wanted_leaves(case, q, k, v, pair_bias),
            inputs.do.flatten(0, 1).transpose(1, 2).contiguous(),
            canonical,
        )


FLEX = Flex()

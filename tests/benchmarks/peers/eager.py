# SPDX-License-Identifier: Apache-2.0
"""Plain PyTorch in the inputs' dtype, as model code writes it; once as it is, once through torch.compile."""

import torch
from torch import Tensor

from tests.benchmarks.case import Case, Inputs
from tests.benchmarks.peers.base import Call, Peer, leaf, wanted_leaves


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask_bias: Tensor | None, pair_bias: Tensor | None) -> Tensor:
    """q, k, v [B, N, H, L, D], biases broadcast to [B, N, H, Lq, Lk]; returns [B, N, H, Lq, D]."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask_bias is not None:
        logits = logits + mask_bias
    if pair_bias is not None:
        logits = logits + pair_bias
    return torch.softmax(logits, dim=-1) @ v


class Eager(Peer):
    def __init__(self, name: str, compiled: bool):
        self.name = name
        self.compiled = compiled

    def bind(self, case: Case, inputs: Inputs) -> Call:
        q, k, v = (leaf(x.transpose(2, 3)) for x in (inputs.q, inputs.k, inputs.v))  # [B, N, H, L, D]
        mask_bias = inputs.mask_bias()
        pair_bias = None if inputs.pair_bias is None else leaf(inputs.pair_bias)
        attention = eager_attention
        if self.compiled:
            torch._dynamo.reset()  # past torch's limit of recompilations it would silently run uncompiled
            attention = torch.compile(eager_attention, dynamic=False)
        return Call(
            lambda: attention(q, k, v, mask_bias, pair_bias),
            wanted_leaves(case, q, k, v, pair_bias),
            inputs.do.transpose(2, 3).contiguous(),
            lambda name, tensor: tensor if name == "pair_bias" else tensor.transpose(2, 3),
        )


EAGER = Eager("eager", compiled=False)
COMPILE = Eager("compile", compiled=True)

# SPDX-License-Identifier: Apache-2.0
"""Who computes the block's attention, and whether the whole block goes through torch.compile.

An attention function here is `attend(q, k, v, keep, pair_bias, gate)`: q, k, v, gate views [B, N, L, H, D], keep bool
[B, N, 1, 1, L], pair_bias [B, 1, H, L, L] or None; B = 1. Its output is times sigmoid(gate).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from deepspeed_ds4sci.nn import attention as block_attention
from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention
from tests.benchmarks.case import additive_mask
from tests.benchmarks.evoformer_block.problem import BlockCase
from tests.benchmarks.peers import PEERS, Ours, deepspeed, flex
from tests.benchmarks.peers.eager import eager_attention

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]


@contextmanager
def attention_by(attend: Attend) -> Iterator[None]:
    """The attention modules of `deepspeed_ds4sci.nn` call `attend` in place of the op.

    The seam is the module's name for the op: whatever the four modules need passes through that one call.
    """

    def op(q, k, v, *, mask_bias, pair_bias, gate, implementation):
        if implementation is not None:
            raise ValueError(f"implementation must be None where attention is exchanged, got {implementation!r}")
        return attend(q, k, v, mask_bias, pair_bias, gate)

    with mock.patch.object(block_attention, "evoformer_attention", op):
        yield


def ours() -> Attend:
    return lambda q, k, v, keep, pair_bias, gate: evoformer_attention(
        q, k, v, mask_bias=keep, pair_bias=pair_bias, gate=gate
    )


def gate_apart(attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> Attend:
    """`attend` without a gate, and plain PyTorch for the gate. The product has the layout of what `attend` returns."""
    return lambda q, k, v, keep, pair_bias, gate: attend(q, k, v, keep, pair_bias) * torch.sigmoid(gate)


def ours_gate_apart() -> Attend:
    return gate_apart(
        lambda q, k, v, keep, pair_bias: evoformer_attention(q, k, v, mask_bias=keep, pair_bias=pair_bias)
    )


def eager() -> Attend:
    def attend(q, k, v, keep, pair_bias):
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))
        return eager_attention(q, k, v, additive_mask(keep, q.dtype), pair_bias).transpose(2, 3)

    return gate_apart(attend)


def flex_by(function: Callable) -> Attend:
    """`function`: flex_attention or a compiled form of it."""

    def attend(q, k, v, keep, pair_bias):
        batch, rows = q.shape[:2]
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # [B * N, H, L, D]
        mask = additive_mask(keep, q.dtype).flatten(0, 1)[:, 0, 0]  # [B * N, L]
        bias = None if pair_bias is None else pair_bias.squeeze(1).squeeze(0).contiguous()
        o = function(q, k, v, score_mod=flex.score_function(bias, mask, rows))
        return o.transpose(1, 2).unflatten(0, (batch, rows))

    return gate_apart(attend)


def flex_compiled() -> Attend:
    return flex_by(flex.compiled_flex_attention())


def flex_traced() -> Attend:
    """Not compiled by itself: for a block that is compiled as a whole."""
    return flex_by(flex.flex_attention)


def deepspeed_own() -> Attend:
    wrapper = deepspeed.own_attention("bf16")

    def attend(q, k, v, keep, pair_bias):
        o = wrapper(q, k, v, [additive_mask(keep, q.dtype), pair_bias])
        if o.requires_grad:
            o.register_hook(Tensor.contiguous)  # its wrapper makes the inputs contiguous, but not this gradient
        return o

    return gate_apart(attend)


def available(device_type: str) -> str | None:
    return None


@dataclass(frozen=True)
class Variant:
    """A column of the table.

    make: returns the attention function; called once for every case, after `missing` said nothing.
    missing: device type -> why it cannot run here, or None.
    whole: the block goes through torch.compile, attention included, as one graph: what cannot be traced is an error.
    dtypes: what the attention function takes.
    """

    name: str
    make: Callable[[], Attend]
    missing: Callable[[str], str | None] = available
    whole: bool = False
    dtypes: tuple[str, ...] = ("bf16", "fp32")

    def refused_reason(self, case: BlockCase) -> str | None:
        return None if case.dtype in self.dtypes else f"{' and '.join(self.dtypes)} only"

    def forward_of(self, module: nn.Module) -> Callable:
        """What to call in place of `module`."""
        if not self.whole:
            return module
        torch._dynamo.reset()  # else the graph of the variant before counts against torch's limit of recompilations
        return torch.compile(module, dynamic=False, fullgraph=True)


OURS = "ours"

# In the order of their cost: where time runs out, the last ones are skipped.
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(OURS, ours, Ours(None).unavailable_reason),
        Variant("ours-gate-apart", ours_gate_apart, Ours(None).unavailable_reason),
        Variant("eager", eager),
        Variant("deepspeed", deepspeed_own, PEERS["deepspeed"].unavailable_reason, dtypes=("bf16",)),
        Variant("flex", flex_compiled, PEERS["flex"].unavailable_reason),
        Variant("compile", eager, whole=True),
        Variant("ours+compile", ours, Ours(None).unavailable_reason, whole=True),
        Variant("flex+compile", flex_traced, PEERS["flex"].unavailable_reason, whole=True),
    )
}

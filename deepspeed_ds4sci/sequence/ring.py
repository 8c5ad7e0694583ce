# SPDX-License-Identifier: Apache-2.0
"""Exact attention over a ring of ranks: queries stay, key and value blocks travel.

Each rank holds one zig-zag shard (see `layout`). At step t it attends to the block that started t ranks before it,
while the next block is on its way, so at most two remote key/value blocks are held. The backward pass recomputes the
scores; the gradient of a block travels with it and comes home after the last step. A ring of one rank is plain tiled
attention with the same arithmetic.

Source: Liu, Zaharia, Abbeel 2023 (ring attention); Milakov, Gimelshein 2018 (online softmax).
"""

import functools

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from deepspeed_ds4sci.sequence.blocks import BlockKernel, SoftmaxState, accumulation_dtype
from deepspeed_ds4sci.sequence.kept import kept
from deepspeed_ds4sci.sequence.scores import Range, ScoreRules

Ranges = tuple[Range, ...]


def ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rules: ScoreRules,
    ranges: list[Ranges],
    group: dist.ProcessGroup | None,
    kernel: BlockKernel,
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of all ranks of a ring.

    Args:
        q: [B, Q, H, D]; k, v: [B, Q, G, D] with H a multiple of G: what this rank holds.
        rules: scale, masks, biases and dropout for these heads.
        ranges: for each rank of the ring, in order, the global positions that it holds.
        group: the ring; None: one rank.
        kernel: how blocks are computed.

    Returns:
        [B, Q, H, D], dtype of q. Differentiable once in q, k, v.
    """
    return _RingAttention.apply(q, k, v, rules, ranges, group, kernel)


def _exact(function):
    """Runs without autocast, which would turn fp32 products into 16 bits."""

    @functools.wraps(function)
    def run(ctx, *arguments):
        device_type = next(x for x in arguments if isinstance(x, torch.Tensor)).device.type
        with torch.autocast(device_type, enabled=False):
            return function(ctx, *arguments)

    return run


class _RingAttention(torch.autograd.Function):
    @staticmethod
    @_exact
    def forward(ctx, q, k, v, rules, ranges, group, kernel):
        output, lse = kept("ring attention", lambda: _forward(q, k, v, rules, ranges, _Ring(group), kernel))
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.fixed = rules, ranges, group, kernel
        return output

    @staticmethod
    @once_differentiable
    @_exact
    def backward(ctx, do):
        q, k, v, output, lse = ctx.saved_tensors
        rules, ranges, group, kernel = ctx.fixed
        ring = _Ring(group)
        do, q, output = (_grouped(x, k.shape[2]) for x in (do, q, output))
        delta = (do.to(lse.dtype) * output.to(lse.dtype)).sum(-1)  # [B, G, R, Q]
        dq = torch.zeros_like(q, dtype=accumulation_dtype(q), memory_format=torch.contiguous_format)
        block = torch.stack([k.transpose(1, 2), v.transpose(1, 2)])
        returning = None  # gradients of this step's block from the ranks before, on their way
        for step in range(ring.size):
            following = ring.pass_on(block) if step < ring.size - 1 else None
            keys = ranges[ring.source(step)]
            dblock = torch.stack(
                kernel.backward(do, q, *block, output, lse, delta, rules, ranges[ring.rank], keys, dq)
            )
            if following is not None:
                block = following.wait()
            if returning is not None:
                dblock += returning.wait()
            returning = ring.pass_on(dblock)
        dk, dv = returning.wait()
        dq = _ungrouped(dq).to(q.dtype)
        return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype), None, None, None, None


def _forward(q, k, v, rules, ranges, ring, kernel):
    """(output [B, Q, H, D] in the dtype of q, log-sum-exp [B, G, R, Q])."""
    grouped_q = _grouped(q, k.shape[2])
    block = torch.stack([k.transpose(1, 2), v.transpose(1, 2)])  # [2, B, G, K, D]
    state = SoftmaxState.empty(grouped_q)
    for step in range(ring.size):
        following = ring.pass_on(block) if step < ring.size - 1 else None
        keys = ranges[ring.source(step)]
        kernel.forward(grouped_q, *block, rules, ranges[ring.rank], keys, state)
        if following is not None:
            block = following.wait()
    return _ungrouped(state.output.to(q.dtype)), state.lse


class _Ring:
    """This rank's place in the ring and its two neighbours. Source and target of a lone rank is itself."""

    def __init__(self, group):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def source(self, step: int) -> int:
        """Rank whose block is here at a step."""
        return (self.rank - step) % self.size

    def pass_on(self, block: torch.Tensor) -> "_Transfer":
        """Starts to send `block` to the next rank and to receive the previous rank's."""
        if self.size == 1:
            return _Transfer(block, [], block)
        block = block.contiguous()
        received = torch.empty_like(block)
        target = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        source = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        operations = [
            dist.P2POp(dist.isend, block, target, self.group),
            dist.P2POp(dist.irecv, received, source, self.group),
        ]
        return _Transfer(received, dist.batch_isend_irecv(operations), block)


class _Transfer:
    """A block on its way. Keeps the one that is sent alive until both are done."""

    def __init__(self, received, works, sent):
        self.received, self.works, self.sent = received, works, sent

    def wait(self) -> torch.Tensor:
        for work in self.works:
            work.wait()
        self.works = self.sent = None  # works hold the sent block too
        return self.received


def _grouped(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, Q, H, D] -> [B, G, R, Q, D], contiguous."""
    return x.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).contiguous()


def _ungrouped(x: torch.Tensor) -> torch.Tensor:
    """[B, G, R, Q, D] -> [B, Q, H, D], contiguous."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()

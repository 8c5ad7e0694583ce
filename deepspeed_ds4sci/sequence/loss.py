# SPDX-License-Identifier: Apache-2.0
"""One loss from the logits that each rank holds, and whole outputs from sharded ones, with the right gradient scale.

DeepSpeed adds up the gradients of all ranks and divides by their number, at every ZeRO stage (`average_over_all_ranks`
of the hook sees to that), so a term of the loss that all ranks compute alike counts once. What a rank computes for its
part of a sequence is multiplied by that number, `divisor` below, where its gradient starts: the sum over ranks is then
the gradient of the global mean.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

IGNORE_INDEX = -100


def shift_labels(labels: torch.Tensor, ignore_index: int = IGNORE_INDEX) -> torch.Tensor:
    """[B, S]: the label of each position is the next token; the last position has none. Before any sharding."""
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)


def sharded_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup, divisor: float
) -> torch.Tensor:
    """The mean cross entropy over the valid tokens of all ranks of `group`, as every rank sees it.

    Args:
        logits: [B, L, V], this rank's positions.
        labels: [B, L] int64, of the same positions; IGNORE_INDEX does not count.
        group: ranks over which the mean is taken.
        divisor: see the module's head; 1 where no gradient is reduced.

    Returns:
        fp32 scalar, the same on all ranks; 0 if no label is valid. A rank without valid labels contributes 0.
    """
    local_sum = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return global_mean(local_sum, (labels != IGNORE_INDEX).sum(), group, divisor)


def global_mean(
    local_sum: torch.Tensor, local_count: torch.Tensor, group: dist.ProcessGroup, divisor: float
) -> torch.Tensor:
    """The sums of all ranks of `group` over their counts, 0 for a count of 0; see `sharded_cross_entropy`."""
    return _GlobalMean.apply(local_sum, local_count, group, divisor)


class _GlobalMean(torch.autograd.Function):
    """Sum over ranks divided by the count over ranks; each rank's gradient is its own share, times the divisor."""

    @staticmethod
    def forward(ctx, local_sum, local_count, group, divisor):
        # fp64: a count beyond 2^24 tokens is not exact in fp32.
        totals = torch.stack((local_sum.detach().double(), local_count.double()))
        dist.all_reduce(totals, group=group)
        total, count = totals.unbind()
        count = count.clamp(min=1)
        ctx.scale = divisor / count
        return (total / count).to(local_sum.dtype)

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.scale).to(grad.dtype), None, None, None


def gather_sequence(tensor: torch.Tensor, layout, group: dist.ProcessGroup, factor: float) -> torch.Tensor:
    """The whole [B, S, ...] tensor on every rank from the [B, L, ...] shards.

    Backward: each rank takes the gradient of its own shard, times `factor`; all ranks of the group must go on to
    compute the same loss.
    """
    return _GatherSequence.apply(tensor, layout, group, factor)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, layout, group, factor):
        ctx.layout, ctx.rank, ctx.factor = layout, dist.get_rank(group), factor
        tensor = tensor.contiguous()
        shards = [torch.empty_like(tensor) for _ in range(layout.size)]
        dist.all_gather(shards, tensor, group=group)
        return layout.unshard(shards, 1)

    @staticmethod
    def backward(ctx, grad):
        return ctx.layout.shard(grad, 1, ctx.rank).contiguous() * ctx.factor, None, None, None


def scale_gradient(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The same tensor, whose gradient is multiplied by `factor` on its way back."""
    return _ScaleGradient.apply(tensor, factor)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None

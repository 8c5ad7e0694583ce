# SPDX-License-Identifier: Apache-2.0
"""All-to-all over heads: before attention, a rank trades its tokens of most heads for all tokens of its own heads.

Differentiable through torch's collective. Heads that the ranks do not divide are padded with zero heads, which cost
compute and change nothing.

Axes: B batch, S tokens held outside of attention, P ranks of the Ulysses group, H query heads, G key/value heads.
"""

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_to_all_single

from deepspeed_ds4sci.sequence.layout import padded_length


def heads_per_rank(heads: int, groups: int, size: int) -> tuple[int, int, int]:
    """How H query heads and G key/value heads go to `size` ranks.

    Returns:
        (query heads per rank, key/value heads per rank, repeats): key/value heads are repeated that often before they
        are dealt out. Grouped heads stay grouped where each rank can get whole groups, or one group's share.
    """
    if heads % size == 0 and groups % size == 0:
        return heads // size, groups // size, 1
    if heads % size == 0 and size % groups == 0:
        return heads // size, 1, size // groups
    per_rank = padded_length(heads, size) // size
    return per_rank, per_rank, heads // groups


def own_heads(heads: int, size: int, rank: int) -> tuple[int, int]:
    """Numbers [first, stop) of the query heads that a rank attends with, padding heads left out. A rank that has only
    padding is given the last head."""
    per_rank = padded_length(heads, size) // size
    first = min(rank * per_rank, heads - 1)
    return first, min(first + per_rank, heads)


def tokens_for_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup):
    """q [B, S, H, D], k, v [B, S, G, D] -> [B, P * S, h, D], [B, P * S, g, D] twice: this rank's heads."""
    size = dist.get_world_size(group)
    query_heads, key_heads, repeats = heads_per_rank(q.shape[2], k.shape[2], size)
    parts = [_dealt(q, 1, query_heads, size), *(_dealt(x, repeats, key_heads, size) for x in (k, v))]
    sent = torch.cat(parts, 3)  # [P, B, S, h + 2 g, D]: one collective instead of three
    received = _all_to_all(sent, group)
    whole = received.transpose(0, 1).flatten(1, 2)  # [B, P * S, h + 2 g, D]
    return whole.split([query_heads, key_heads, key_heads], 2)


def heads_for_tokens(output: torch.Tensor, heads: int, group: dist.ProcessGroup) -> torch.Tensor:
    """[B, P * S, h, D] -> [B, S, H, D]: the inverse for the output; padding heads are dropped."""
    size = dist.get_world_size(group)
    sent = output.unflatten(1, (size, -1)).transpose(0, 1)  # [P, B, S, h, D]
    received = _all_to_all(sent, group)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :heads]


def _dealt(x, repeats, per_rank, size):
    """[B, S, heads, D] -> [P, B, S, heads of that rank, D], repeated and zero-padded."""
    if repeats > 1:
        x = x.repeat_interleave(repeats, 2)
    missing = per_rank * size - x.shape[2]
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (size, per_rank)).permute(2, 0, 1, 3, 4)


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    return all_to_all_single(torch.empty_like(x), x, group=group)

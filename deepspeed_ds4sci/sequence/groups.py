# SPDX-License-Identifier: Apache-2.0
"""The process groups of sequence parallelism, and the view of them that DeepSpeed takes (an `mpu`).

Rank r of the world is rank r % size of sequence group r // size: neighbours share a sequence. All ranks that hold the
same place in their sequences are replicas of each other.
"""

from dataclasses import dataclass

import torch.distributed as dist

_created: dict[int, tuple[dist.ProcessGroup, "SequenceGroups"]] = {}


@dataclass(frozen=True)
class SequenceGroups:
    """The groups that this rank is in."""

    sp_group: dist.ProcessGroup
    """Ranks that share one sequence."""

    dp_group: dist.ProcessGroup
    """Ranks that hold the same part of different sequences."""

    world_group: dist.ProcessGroup
    """All ranks: what ZeRO partitions over and gradients are reduced over."""

    own_group: dist.ProcessGroup
    """This rank alone: the model-parallel group, of which there is none."""

    sp_size: int
    sp_rank: int
    dp_size: int
    dp_rank: int


def sequence_groups(size: int) -> SequenceGroups:
    """The groups for `size` ranks per sequence, created by all ranks together at the first call.

    Raises:
        ValueError: the number of ranks is no multiple of `size`.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % size:
        raise ValueError(f"ds4sci.sequence_parallel.size must divide the number of ranks = {world}, got {size}")
    created = _created.get(size)
    if created is not None and created[0] is dist.group.WORLD:
        return created[1]
    dp_size = world // size
    groups = SequenceGroups(
        sp_group=_mine([range(first, first + size) for first in range(0, world, size)], rank),
        dp_group=_mine([range(place, world, size) for place in range(size)], rank),
        world_group=dist.new_group(range(world)),
        own_group=_mine([[each] for each in range(world)], rank),
        sp_size=size,
        sp_rank=rank % size,
        dp_size=dp_size,
        dp_rank=rank // size,
    )
    _created[size] = (dist.group.WORLD, groups)
    return groups


def _mine(members, rank):
    """Creates every group, as torch.distributed asks of every rank, and returns the one with `rank` in it."""
    groups = [dist.new_group(list(ranks)) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)


class SequenceParallelMPU:
    """What DeepSpeed asks about groups, answered from SequenceGroups. There is no model parallelism.

    DeepSpeed's own module for this calls the sequence group the model-parallel one; ZeRO and the gradient norm then
    count what the ranks of a sequence group hold once, though they hold different partitions.
    """

    def __init__(self, groups: SequenceGroups):
        self.groups = groups

    def get_sequence_parallel_group(self):
        return self.groups.sp_group

    def get_sequence_parallel_world_size(self):
        return self.groups.sp_size

    def get_sequence_parallel_rank(self):
        return self.groups.sp_rank

    def get_sequence_data_parallel_group(self):
        return self.groups.world_group

    def get_sequence_data_parallel_world_size(self):
        return dist.get_world_size(self.groups.world_group)

    def get_sequence_data_parallel_rank(self):
        return dist.get_rank(self.groups.world_group)

    def get_data_parallel_group(self):
        """All ranks: ZeRO-3 partitions parameters over this group, unlike stages 1 and 2, which ask for the other."""
        return self.groups.world_group

    def get_data_parallel_group_ranks(self):
        return dist.get_process_group_ranks(self.groups.world_group)

    def get_data_parallel_world_size(self):
        return self.groups.dp_size

    def get_data_parallel_rank(self):
        return self.groups.dp_rank

    def get_model_parallel_group(self):
        return self.groups.own_group

    def get_model_parallel_world_size(self):
        return 1

    def get_model_parallel_rank(self):
        return 0

    def get_tensor_model_parallel_world_size(self):
        """The other name of `get_model_parallel_world_size`, by which universal checkpoints ask."""
        return 1

# SPDX-License-Identifier: Apache-2.0
"""The sharded position table on several ranks: values, gradients only at the owner, saving, memory."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_ds4sci.sequence import position_table
from deepspeed_ds4sci.sequence.layout import Layout
from deepspeed_ds4sci.sequence.position_table import ShardedPositionEmbedding, TableShard, resplit
from tests.distributed.sequence_run import results

POSITIONS, DIM, SEQ_LEN = 45, 6, 32  # not a multiple of 2 or 4 ranks; a batch shorter than the table


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else [result]
        sizes = [tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def whole_table(seed=3):
    torch.manual_seed(seed)
    return nn.Embedding(POSITIONS, DIM)


def sharded_table(seed=3):
    torch.manual_seed(seed)
    return ShardedPositionEmbedding(POSITIONS, DIM, dist.group.WORLD)


def wanted_positions(rank, size):
    """Batches as they come: this rank's part of the sequence, ids that restart per document, other counts per rank."""
    layout = Layout(SEQ_LEN, size, "ring" if size > 1 else "ulysses")
    generator = torch.Generator().manual_seed(rank)
    anything = torch.randint(POSITIONS, (3, 5 + rank), generator=generator)
    return [layout.positions(rank).expand(2, -1), anything, anything[:, :0]]


def check_values_and_gradients():
    rank, size = dist.get_rank(), dist.get_world_size()
    table, plain = sharded_table(), whole_table()
    rows = slice(table.start, table.stop)
    assert torch.equal(table.weight[: table.stop - table.start], plain.weight[rows])
    assert table.weight.shape == (-(-POSITIONS // size), DIM)
    assert (table.weight[table.stop - table.start :] == 0).all()
    errors = []
    for batch in range(3):
        table.zero_grad()
        plain.zero_grad()
        for other in range(size):  # one rank would have seen every rank's positions
            ids = wanted_positions(other, size)[batch]
            factor = torch.randn(*ids.shape, DIM, generator=torch.Generator().manual_seed(other))
            (plain(ids) * factor).sum().backward()
            if other == rank:
                mine = ids, factor
        out = table(mine[0])
        assert torch.equal(out, plain(mine[0]))
        (out * mine[1]).sum().backward()
        scale = plain.weight.grad.abs().max().clamp(min=1e-30)
        held = table.weight.grad[: table.stop - table.start]
        errors.append(float((held - plain.weight.grad[rows]).abs().max() / scale))
        assert (table.weight.grad[table.stop - table.start :] == 0).all()
    return errors


def check_gradient_goes_to_the_owner_only():
    """Everybody asks for one row of the last rank."""
    table = sharded_table()
    table(torch.tensor([POSITIONS - 1])).sum().backward()
    touched = int((table.weight.grad.abs().sum(1) > 0).sum())
    value = float(table.weight.grad.max())
    return touched, value


def check_save_and_resplit():
    """What all ranks save loads under 1, 2, 3 and 5 ranks; nothing is tied to the number of ranks that saved."""
    table = sharded_table()
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, table.state_dict())
    shards = [TableShard(state["weight"], *state["rows"].tolist()) for state in states]
    for size in (1, 2, 3, 5):
        for rank in range(size):
            start, stop = position_table.row_range(POSITIONS, size, rank)
            rows = torch.zeros(stop - start, DIM)
            resplit(shards, POSITIONS, DIM, start, stop, rows)
            assert torch.equal(rows, whole_table().weight[start:stop])
    other = sharded_table(seed=9)
    other.load_shards(shards)
    assert torch.equal(other.weight, table.weight)
    other.load_state_dict(whole_table(seed=8).state_dict())
    expected = whole_table(seed=8).weight[other.start : other.stop]
    assert torch.equal(other.weight[: other.stop - other.start], expected)
    replaced = ShardedPositionEmbedding.from_table(whole_table().weight, dist.group.WORLD)
    assert torch.equal(replaced.weight, table.weight) and replaced.weight.requires_grad
    assert replaced.weight.ds4sci_shard == (table.start, table.stop)


def check_never_gathered_whole():
    """The largest tensor made while drawing, training, saving and loading, in elements."""
    positions, dim = 4096, 8
    position_table._DRAW_ELEMENTS = 1024
    with LargestTensor() as largest:
        table = ShardedPositionEmbedding(positions, dim, dist.group.WORLD)
        ids = torch.arange(64).view(2, 32) + 2000 + 32 * dist.get_rank()
        table(ids).sum().backward()
        table.load_shards([table.shard()])
    return largest.elements, positions * dim


def check_bad_positions_are_refused_everywhere():
    table = sharded_table()
    ids = torch.tensor([3, POSITIONS if dist.get_rank() == dist.get_world_size() - 1 else 5])
    try:
        table(ids)
    except ValueError as error:
        return str(error)


def checks():
    check_save_and_resplit()
    return (
        check_values_and_gradients(),
        check_gradient_goes_to_the_owner_only(),
        check_never_gathered_whole(),
        check_bad_positions_are_refused_everywhere(),
    )


@pytest.mark.distributed(4)
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_sharded_table_is_the_whole_one(world_size):
    for rank, result in enumerate(results(world_size)):
        errors, (touched, value), (largest, whole), message = result["position_table"]
        assert max(errors) <= 2e-6
        is_owner = rank == world_size - 1
        assert (touched, value) == ((1, world_size) if is_owner else (0, 0))
        assert largest <= whole / world_size + 1
        assert f"position_ids must be in [0, {POSITIONS}); rank {world_size - 1} of {world_size} asks" in message
        assert message.endswith("from 3 to 45") == is_owner

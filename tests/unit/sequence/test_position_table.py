# SPDX-License-Identifier: Apache-2.0
"""The sharded position table without a process group: initial values, shards, state dicts, errors."""

import pytest
import torch
from torch import nn

from deepspeed_ds4sci.sequence import position_table
from deepspeed_ds4sci.sequence.position_table import ShardedPositionEmbedding, TableShard, resplit, row_range


@pytest.mark.parametrize(("positions", "dim"), [(1, 1), (3, 5), (37, 6), (64, 16), (101, 7), (50, 48), (129, 1)])
@pytest.mark.parametrize("elements", [1, 64, 1000])
def test_drawing_in_pieces_is_drawing_at_once(positions, dim, elements, monkeypatch):
    monkeypatch.setattr(position_table, "_DRAW_ELEMENTS", elements)
    torch.manual_seed(4)
    table = ShardedPositionEmbedding(positions, dim, init_std=0.02)
    after = torch.rand(3)
    torch.manual_seed(4)
    plain = nn.init.normal_(torch.empty(positions, dim), std=0.02)
    assert torch.equal(table.weight, plain)
    assert torch.equal(torch.rand(3), after)  # the generator is left as one draw leaves it


def test_pieces_are_bounded(monkeypatch):
    monkeypatch.setattr(position_table, "_DRAW_ELEMENTS", 64)
    pieces = [len(rows) * 8 for _, rows in position_table._drawn_rows(1000, 8, 1.0, None)]
    assert len(pieces) > 100 and max(pieces) <= 64 + 16


def test_a_generator_of_its_own_leaves_the_default_one_alone():
    state = torch.get_rng_state()
    one = ShardedPositionEmbedding(9, 4, generator=torch.Generator().manual_seed(1))
    other = ShardedPositionEmbedding(9, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_meta_device_draws_nothing_until_asked():
    state = torch.get_rng_state()
    table = ShardedPositionEmbedding(2**40, 8, device="meta")
    assert table.weight.shape == (2**40, 8) and torch.equal(torch.get_rng_state(), state)


def test_one_rank_is_an_embedding():
    table, plain = ShardedPositionEmbedding(11, 4), nn.Embedding(11, 4)
    plain.weight.data.copy_(table.weight)
    ids = torch.tensor([[0, 3, 3], [10, 1, 0]])
    out = table(ids)
    assert torch.equal(out, plain(ids))
    out.square().sum().backward()
    plain(ids).square().sum().backward()
    assert torch.equal(table.weight.grad, plain.weight.grad)
    with pytest.raises(ValueError, match=r"position_ids must be in \[0, 11\), got values from -1 to 11"):
        table(torch.tensor([-1, 11]))


@pytest.mark.parametrize(("positions", "size"), [(8, 4), (10, 4), (9, 4), (2, 4), (7, 1)])
def test_row_ranges_cover_the_table_once(positions, size):
    ranges = [row_range(positions, size, rank) for rank in range(size)]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(positions))
    assert max(stop - start for start, stop in ranges) == -(-positions // size)


@pytest.mark.parametrize(("saved", "loaded"), [(4, 2), (2, 4), (3, 5), (1, 3), (4, 1)])
def test_shards_of_any_number_of_ranks_load_into_any_other(saved, loaded):
    whole = torch.randn(13, 3)
    shards = [TableShard(whole[slice(*row_range(13, saved, r))], *row_range(13, saved, r), 13) for r in range(saved)]
    for rank in range(loaded):
        start, stop = row_range(13, loaded, rank)
        rows = torch.zeros(5 + stop - start, 3)
        resplit(iter(shards), 13, 3, start, stop, rows)
        assert torch.equal(rows[: stop - start], whole[start:stop]) and (rows[stop - start :] == 0).all()


def test_state_dict_loads_shards_and_whole_tables():
    table = ShardedPositionEmbedding(5, 3)
    state = table.state_dict()
    assert state["rows"].tolist() == [0, 5, 5]
    other = ShardedPositionEmbedding(5, 3)
    other.load_state_dict(state)
    assert torch.equal(other.weight, table.weight)
    plain = nn.Embedding(5, 3)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.weight, plain.weight)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight\""):
        other.load_state_dict({})


def test_a_bad_load_is_refused_and_changes_nothing():
    table = ShardedPositionEmbedding(5, 3)
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"saved position table must be \[5, 3\], got \[6, 3\]"):
        table.load_state_dict(nn.Embedding(6, 3).state_dict())
    with pytest.raises(ValueError, match=r"saved position table must be \[5, 3\], got \[5, 4\]"):
        table.load_shards([TableShard(torch.zeros(5, 4), 0, 5, 5)])
    with pytest.raises(ValueError, match=r"no shard holds 3 of .* rows \[0, 5\); the first is 2, the last 4"):
        table.load_shards([TableShard(torch.zeros(2, 3), 0, 2, 5)])
    assert torch.equal(table.weight, before)


def test_a_shard_checks_itself():
    with pytest.raises(ValueError, match=r"rows \[2, 5\) must have 3 rows, got 2"):
        TableShard(torch.zeros(2, 3), 2, 5, 8)
    with pytest.raises(ValueError, match=r"must be rows \[start, stop\) of 8, got \[6, 9\) and shape \[3, 3\]"):
        TableShard(torch.zeros(3, 3), 6, 9, 8)
    with pytest.raises(ValueError, match="num_positions and dim must be at least 1, got 0 and 3"):
        ShardedPositionEmbedding(0, 3)

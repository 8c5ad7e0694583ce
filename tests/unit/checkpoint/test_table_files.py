# SPDX-License-Identifier: Apache-2.0
"""Shards of a position table on disk: put together whatever their number; damage is named."""

import pytest
import torch

from deepspeed_ds4sci.checkpoint.table_files import saved_table, write_shard
from deepspeed_ds4sci.checkpoint.universal_files import universal_table, write_universal_table
from deepspeed_ds4sci.sequence.position_table import TableShard, row_range

TABLE = torch.arange(35.0).view(7, 5)


def write(folder, size, ranks=None, name="transformer.wpe"):
    for rank in range(size) if ranks is None else ranks:
        start, stop = row_range(7, size, rank)
        shard = TableShard(TABLE[start:stop], start, stop, 7)
        write_shard(folder, rank, size, name, shard, {"exp_avg": shard}, {"step": torch.tensor(3.0)})


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_rows_come_back(tmp_path, size):
    write(tmp_path, size)
    saved = saved_table(tmp_path)
    assert (saved.name, saved.num_positions, saved.dim, saved.state) == ("transformer.wpe", 7, 5, ("exp_avg",))
    assert torch.equal(saved.whole(), TABLE) and torch.equal(saved.whole("exp_avg"), TABLE)
    assert torch.equal(saved.rows(None, 2, 6, torch.empty(4, 5)), TABLE[2:6])


def test_a_folder_without_a_table(tmp_path):
    assert saved_table(tmp_path) is None


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, 3, ranks=(0, 2))
    with pytest.raises(ValueError, match="lacks parts of the position table: ds4sci_position_table_00001_of_00003.pt"):
        saved_table(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    write(tmp_path, 2)
    path = tmp_path / "ds4sci_position_table_00001_of_00002.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="00001_of_00002.pt is damaged and cannot be read"):
        saved_table(tmp_path)


def test_shards_of_different_tables(tmp_path):
    write(tmp_path, 2, ranks=(0,))
    write(tmp_path, 2, ranks=(1,), name="other")
    with pytest.raises(ValueError, match="are parts of different position tables"):
        saved_table(tmp_path)


def test_as_a_parameter_of_a_universal_checkpoint(tmp_path):
    write(tmp_path, 3)
    write_universal_table(saved_table(tmp_path), tmp_path / "out")
    table = universal_table(tmp_path / "out", "transformer.wpe")
    assert (table.num_positions, table.dim, table.state) == (7, 5, ("exp_avg",))
    assert float(table.scalars["step"]) == 3.0
    assert torch.equal(table.rows("exp_avg", 3, 7, torch.empty(4, 5)), TABLE[3:7])
    assert universal_table(tmp_path / "out", "other") is None

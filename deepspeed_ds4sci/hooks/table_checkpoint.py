# SPDX-License-Identifier: Apache-2.0
"""A sharded position table in DeepSpeed's checkpoints: a file per shard beside DeepSpeed's own."""

import torch

from deepspeed_ds4sci.checkpoint.table_files import saved_table, write_shard
from deepspeed_ds4sci.checkpoint.universal_files import universal_table


class TableCheckpoint:
    """A table with its optimizer state, a part of `EngineCheckpoint`.

    Args:
        name: the table's name in the model.
        table: the sharded table.
        optimizer: its TableOptimizer.
    """

    def __init__(self, name, table, optimizer):
        self.name, self.table, self.optimizer = name, table, optimizer

    def write(self, folder):
        if self.optimizer.groups.dp_rank != 0:
            return None
        table = self.table
        state = self.optimizer.optimizer.state.get(table.weight, {})
        sharded = {key: value for key, value in state.items() if _is_sharded(value, table)}
        return write_shard(
            folder,
            table.rank,
            table.size,
            self.name,
            table.shard(),
            {key: table.shard(value) for key, value in sharded.items()},
            {key: value for key, value in state.items() if key not in sharded},
        )

    def check(self, folder):
        saved = self._saved(folder)
        if saved is None:
            return
        wanted = (self.table.num_positions, self.table.dim)
        if (saved.num_positions, saved.dim) != wanted:
            raise ValueError(
                f"the saved position table must be {list(wanted)}, got [{saved.num_positions}, {saved.dim}]"
            )
        if saved.name != self.name:
            raise ValueError(f"the saved position table must be that of {self.name}, got {saved.name}")

    @torch.no_grad()
    def read(self, folder, module_only, optimizer_states):
        saved, table = self._saved(folder), self.table
        if saved is None:
            return  # the checkpoint of an unsharded model: its table came with the other weights
        table.weight.copy_(self._rows(saved, None))
        if not optimizer_states:
            return
        state = dict(saved.scalars)
        for key in saved.state:
            state[key] = self._rows(saved, key)
        self.optimizer.optimizer.state[table.weight] = state

    def _saved(self, folder):
        return saved_table(folder) or universal_table(folder, self.name)

    def _rows(self, saved, key):
        table = self.table
        return saved.rows(key, table.start, table.stop, torch.zeros_like(table.weight))


def _is_sharded(value, table):
    return isinstance(value, torch.Tensor) and value.shape == table.weight.shape

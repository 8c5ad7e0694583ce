# SPDX-License-Identifier: Apache-2.0
"""A sharded position table in DeepSpeed's checkpoints: one file per shard beside DeepSpeed's own, in a form that does
not depend on how many ranks there were.

The files are complete before DeepSpeed names the checkpoint the latest one, so a crash in between leaves the previous
checkpoint chosen.
"""

import functools
import os
import pickle
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist

from deepspeed_ds4sci.sequence.position_table import TableShard, resplit

_PREFIX = "ds4sci_position_table"


class TableCheckpoint:
    """Saves and loads one table with its optimizer state.

    Args:
        engine: its save_checkpoint and load_checkpoint are wrapped.
        name: the table's name in the model.
        table: the sharded table.
        optimizer: its TableOptimizer.
    """

    def __init__(self, engine, name, table, optimizer):
        self.engine, self.name, self.table, self.optimizer = engine, name, table, optimizer

    def install(self):
        self.engine.save_checkpoint = functools.partial(self._save_checkpoint, self.engine.save_checkpoint)
        self.engine.load_checkpoint = functools.partial(self._load_checkpoint, self.engine.load_checkpoint)

    def _save_checkpoint(self, original, save_dir, tag=None, *args, **kwargs):
        tag = str(f"global_step{self.engine.global_steps}" if tag is None else tag)
        folder = Path(save_dir) / tag
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(f"{_PREFIX}_*"):
                stale.unlink()
        dist.barrier()
        if self.optimizer.groups.dp_rank == 0:
            self._write(folder)
        dist.barrier()
        return original(save_dir, tag, *args, **kwargs)

    def _write(self, folder):
        state = self.optimizer.optimizer.state.get(self.table.weight, {})
        path = folder / f"{_PREFIX}_{self.table.rank:05d}_of_{self.table.size:05d}.pt"
        partial = path.with_suffix(".partial")
        sharded = {key: value for key, value in state.items() if _is_sharded(value, self.table)}
        torch.save(
            {
                "name": self.name,
                "weight": _plain(self.table.shard()),
                "state": {key: _plain(self.table.shard(value)) for key, value in sharded.items()},
                "scalars": {key: value for key, value in state.items() if key not in sharded},
            },
            partial,
        )
        os.replace(partial, path)

    def _load_checkpoint(self, original, load_dir, tag=None, *args, **kwargs):
        result = original(load_dir, tag, *args, **kwargs)
        if result[0] is None:
            return result
        folder = Path(load_dir) / (tag or (Path(load_dir) / "latest").read_text().strip())
        paths = _shard_paths(folder)
        if not paths:
            return result  # the checkpoint of an unsharded model: its table came with the other weights
        with_state = kwargs.get("load_optimizer_states", True) and not kwargs.get("load_module_only", False)
        self._read(paths, with_state)
        return result

    @torch.no_grad()
    def _read(self, paths, with_state):
        table = self.table
        self.table.load_shards(_shards(paths, lambda saved: saved["weight"]))
        if not with_state:
            return
        first = _load(paths[0])
        state = dict(first["scalars"])
        for key in first["state"]:
            rows = torch.zeros_like(table.weight)
            shards = _shards(paths, lambda saved, key=key: saved["state"][key])
            resplit(shards, table.num_positions, table.dim, table.start, table.stop, rows)
            state[key] = rows
        self.optimizer.optimizer.state[table.weight] = state


def _is_sharded(value, table):
    return isinstance(value, torch.Tensor) and value.shape == table.weight.shape


def _plain(shard):
    """A shard as plain values, which torch.load reads without running code."""
    return {
        "rows": shard.rows.cpu().clone(),
        "start": shard.start,
        "stop": shard.stop,
        "num_positions": shard.num_positions,
    }


def _shard_paths(folder):
    """The files of all shards of a checkpoint, in order.

    Raises:
        ValueError: one is missing.
    """
    paths = sorted(folder.glob(f"{_PREFIX}_*_of_*.pt"))
    if not paths:
        return []
    count = int(paths[0].stem.rpartition("_")[2])
    expected = [folder / f"{_PREFIX}_{rank:05d}_of_{count:05d}.pt" for rank in range(count)]
    missing = [path.name for path in expected if path not in paths]
    if missing:
        raise ValueError(f"the checkpoint {folder} lacks parts of the position table: {', '.join(missing)}")
    return expected


def _shards(paths, part):
    """One shard in memory at a time."""
    for path in paths:
        yield TableShard(**part(_load(path)))


def _load(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged and cannot be read: {error}") from error

# SPDX-License-Identifier: Apache-2.0
"""The files of a sharded position table in a checkpoint: one per shard, in a form that does not depend on how many
ranks there were. They are read one at a time, mapped into memory, so that nobody holds more than what is asked for.
"""

import os
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from deepspeed_ds4sci.sequence.position_table import TableShard, resplit

_PREFIX = "ds4sci_position_table"


@dataclass(frozen=True)
class SavedTable:
    """A table in a checkpoint, or its optimizer state.

    name: of the module in the model, such as "transformer.wpe".
    state: names of the optimizer's tensors of the weight's shape, such as "exp_avg".
    scalars: the optimizer's other values, such as "step".
    """

    folder: Path
    paths: tuple[Path, ...]
    name: str
    num_positions: int
    dim: int
    state: tuple[str, ...]
    scalars: dict

    def rows(self, key: str | None, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Copies rows [start, stop) of the weight (key None) or of an optimizer tensor into out and returns it.

        Args:
            out: [at least stop - start, D].

        Raises:
            ValueError: a file is damaged, or rows are missing.
        """
        resplit(self._shards(key), self.num_positions, self.dim, start, stop, out)
        return out

    def whole(self, key: str | None = None) -> torch.Tensor:
        """[N, D] fp32 on the CPU."""
        return self.rows(key, 0, self.num_positions, torch.empty(self.num_positions, self.dim))

    def _shards(self, key) -> Iterator[TableShard]:
        for path in self.paths:
            saved = _load(path)
            yield TableShard(**(saved["weight"] if key is None else saved["state"][key]))


def saved_table(folder: Path) -> SavedTable | None:
    """The table in a checkpoint's folder; None if it has none of its own.

    Raises:
        ValueError: a shard is missing or damaged, or shards are of different tables.
    """
    paths = _shard_paths(folder)
    if not paths:
        return None
    first = _load(paths[0])
    for path in paths[1:]:
        if _identity(_load(path)) != _identity(first):
            raise ValueError(f"{path} and {paths[0]} are parts of different position tables")
    return SavedTable(
        folder=folder,
        paths=tuple(paths),
        name=first["name"],
        num_positions=first["weight"]["num_positions"],
        dim=first["weight"]["rows"].shape[1],
        state=tuple(first["state"]),
        scalars=dict(first["scalars"]),
    )


def write_shard(
    folder: Path, rank: int, size: int, name: str, weight: TableShard, state: dict[str, TableShard], scalars: dict
) -> Path:
    """Writes the file of rank `rank` of `size`, and returns it. See `SavedTable` for the arguments."""
    path = folder / f"{_PREFIX}_{rank:05d}_of_{size:05d}.pt"
    save_whole(
        {
            "name": name,
            "weight": _plain(weight),
            "state": {key: _plain(shard) for key, shard in state.items()},
            "scalars": scalars,
        },
        path,
    )
    return path


def save_whole(content, path: Path) -> None:
    """torch.save into a file that exists only once it is complete."""
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    os.replace(partial, path)


def load_whole(path: Path, mmap: bool = False, plain: bool = True):
    """torch.load on the CPU.

    Args:
        mmap: tensors are read where they are used.
        plain: the file has plain values only; False: objects of DeepSpeed's too, for which code of the file is run.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=plain, mmap=mmap)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged and cannot be read: {error}") from error


def _load(path):
    return load_whole(path, mmap=True)


def _identity(saved):
    weight = saved["weight"]
    return saved["name"], weight["num_positions"], weight["rows"].shape[1], set(saved["state"])


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

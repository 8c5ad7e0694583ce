# SPDX-License-Identifier: Apache-2.0
"""A position table in DeepSpeed's universal checkpoints, which hold every parameter whole, in a folder of its name."""

from dataclasses import dataclass
from pathlib import Path

import torch

from deepspeed_ds4sci.checkpoint.table_files import SavedTable, load_whole, save_whole

_WEIGHT = "fp32"
_PARAMETER = "param"  # DeepSpeed's key of the tensor in a file


@dataclass(frozen=True)
class UniversalTable:
    """As `SavedTable`, of which it has what loading needs."""

    folder: Path  # of the parameter
    name: str
    num_positions: int
    dim: int
    state: tuple[str, ...]
    scalars: dict

    def rows(self, key: str | None, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """As `SavedTable.rows`."""
        tensor = _tensor(self.folder / f"{key or _WEIGHT}.pt").view(self.num_positions, self.dim)
        out[: stop - start].copy_(tensor[start:stop])
        return out


def universal_table(folder: Path, name: str) -> UniversalTable | None:
    """The table `name` of the universal checkpoint in `folder`; None if there is none.

    Raises:
        ValueError: a file is damaged, or the parameter is no table.
    """
    parameter = folder / "zero" / f"{name}.weight"
    if not (parameter / f"{_WEIGHT}.pt").is_file():
        return None
    weight = _tensor(parameter / f"{_WEIGHT}.pt")
    if weight.dim() != 2:
        raise ValueError(f"{parameter / _WEIGHT}.pt must hold a table of 2 axes, got shape {list(weight.shape)}")
    files = sorted(path.stem for path in parameter.glob("*.pt"))
    step = parameter / "step.pt"
    return UniversalTable(
        folder=parameter,
        name=name,
        num_positions=weight.shape[0],
        dim=weight.shape[1],
        state=tuple(key for key in files if key not in (_WEIGHT, "step")),
        scalars={"step": torch.as_tensor(float(load_whole(step)))} if step.exists() else {},
    )


def write_universal_table(saved: SavedTable, folder: Path) -> None:
    """Writes a table and its optimizer state into a universal checkpoint, put together in CPU memory."""
    parameter = folder / "zero" / f"{saved.name}.weight"
    parameter.mkdir(parents=True, exist_ok=True)
    for key in (None, *saved.state):
        save_whole({_PARAMETER: saved.whole(key), "cat_dim": 0}, parameter / f"{key or _WEIGHT}.pt")
    if "step" in saved.scalars:
        save_whole(saved.scalars["step"], parameter / "step.pt")


def _tensor(path):
    content = load_whole(path, mmap=True)
    return content[_PARAMETER] if isinstance(content, dict) else content

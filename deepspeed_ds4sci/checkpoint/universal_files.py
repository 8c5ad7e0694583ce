# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's universal checkpoints, which hold every parameter whole in a folder of its name; a table in them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from deepspeed_ds4sci.checkpoint.table_files import SavedTable, load_whole, save_whole

ADAM = ("exp_avg", "exp_avg_sq")
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
    name = f"{saved.name}.weight"
    for key in (None, *saved.state):
        save_parameter(folder, name, {key or _WEIGHT: saved.whole(key)})
    if "step" in saved.scalars:
        save_parameter(folder, name, {"step": saved.scalars["step"]})


def save_parameter(folder: Path, name: str, state: dict) -> None:
    """Writes a parameter into a universal checkpoint.

    Args:
        state: "fp32": the weight; "step": the number of optimizer steps; others: of the weight's shape.
    """
    parameter = folder / "zero" / name
    parameter.mkdir(parents=True, exist_ok=True)
    for key, value in state.items():
        # A copy: of a view torch.save would write all that it is a part of.
        content = value if key == "step" else {_PARAMETER: value.clone(), "cat_dim": 0}
        save_whole(content, parameter / f"{key}.pt")


def saved_shape(folder: Path, name: str) -> torch.Size | None:
    """Of a parameter of a universal checkpoint; None: it is not there.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "zero" / name / f"{_WEIGHT}.pt"
    return _tensor(path).shape if path.is_file() else None


def saved_state(folder: Path, name: str, optimizer_states: bool) -> dict:
    """The "fp32" weight of a parameter, and its optimizer state if wanted, in CPU memory.

    Raises:
        ValueError: a file is missing or damaged.
    """
    keys = (_WEIGHT, *ADAM) if optimizer_states else (_WEIGHT,)
    state = {key: _tensor(folder / "zero" / name / f"{key}.pt", mmap=False) for key in keys}
    return state | ({"step": load_whole(folder / "zero" / name / "step.pt")} if optimizer_states else {})


def _tensor(path, mmap=True):
    content = load_whole(path, mmap=mmap)
    return content[_PARAMETER] if isinstance(content, dict) else content

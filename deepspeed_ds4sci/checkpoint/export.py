# SPDX-License-Identifier: Apache-2.0
"""One state dict from the files of a DeepSpeed checkpoint, of any ZeRO stage, with or without a sharded table."""

from collections.abc import Mapping
from pathlib import Path

import torch

from deepspeed_ds4sci.checkpoint.manifest import check_files, folder_to_read
from deepspeed_ds4sci.checkpoint.table_files import load_whole, save_whole, saved_table
from deepspeed_ds4sci.models.configs import GenSLMConfig
from deepspeed_ds4sci.models.hugging_face import to_hugging_face


def checkpoint_folder(directory: Path | str, tag: str | None = None) -> Path:
    """The folder of a tag; None: of the latest checkpoint.

    Raises:
        ValueError: it is not there.
    """
    directory = Path(directory)
    if tag is None:
        latest = directory / "latest"
        if not latest.is_file():
            raise ValueError(f"{directory} must hold DeepSpeed checkpoints, but has no file `latest`; name a tag")
        tag = latest.read_text().strip()
    if not tag:
        raise ValueError(f"{directory / 'latest'} is empty; name a tag")
    return folder_to_read(directory / tag)


def exported_state_dict(
    directory: Path | str, tag: str | None = None, genslm: GenSLMConfig | None = None
) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint under the names of the model that the script built, fp32, in CPU memory.

    Args:
        directory: what was passed to save_checkpoint.
        tag: of the checkpoint; None: the latest.
        genslm: the checkpoint is one of `GenSLM` with this configuration, and Hugging Face's names are wanted.

    Raises:
        ValueError: there is no such checkpoint, or a file is missing or damaged.
        NotImplementedError: see `to_hugging_face`.
    """
    folder = checkpoint_folder(directory, tag)
    check_files(folder)
    state = _zero_weights(folder) if list(folder.glob("*_optim_states.pt")) else _plain_weights(folder)
    add_table(state, folder)
    return state if genslm is None else to_hugging_face(state, genslm)


def add_table(state: dict, folder: Path) -> None:
    """Adds the whole position table, if the checkpoint has a sharded one."""
    table = saved_table(folder)
    if table is not None:
        state[f"{table.name}.weight"] = table.whole()


def export(
    directory: Path | str, out: Path | str, tag: str | None = None, genslm: GenSLMConfig | None = None
) -> Mapping[str, torch.Tensor]:
    """Writes `exported_state_dict` to a file, whole or not at all: safetensors if it ends so, else torch's format.

    A folder gets the file pytorch_model.bin.

    Raises:
        ImportError: safetensors is not installed.
    """
    out = Path(out) / "pytorch_model.bin" if Path(out).is_dir() else Path(out)
    state = exported_state_dict(directory, tag, genslm)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix != ".safetensors":
        save_whole(state, out)
        return state
    from safetensors.torch import save_file

    partial = out.with_name(out.name + ".partial")
    # The format has no tied tensors: each name gets values of its own.
    save_file({name: tensor.clone() for name, tensor in state.items()}, partial, metadata={"format": "pt"})
    partial.replace(out)
    return state


def _zero_weights(folder):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name)
    except (OSError, RuntimeError, KeyError) as error:
        raise ValueError(f"the ZeRO checkpoint in {folder} cannot be read: {error}") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def _plain_weights(folder):
    files = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(files) != 1:
        raise ValueError(f"{folder} must hold one mp_rank_*_model_states.pt, got {len(files)}")
    state = load_whole(files[0], plain=False)["module"]
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}

# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's universal checkpoints of engines with a sharded position table.

DeepSpeed converts what it wrote with ZeRO; `unpartitioned` converts what it wrote without. The table and its optimizer
state are added as the parameter that they are in an unsharded model, so the result loads with any number of ranks per
sequence, and without sharding too. What DeepSpeed writes has one of two forms, for stages 1 and 2 or for stage 3, and
loads there alone; here it gets what both look for, and at stage 0 the hooks load it.
"""

import argparse
import shutil
from pathlib import Path

import torch

from deepspeed_ds4sci.checkpoint.manifest import check_files, folder_to_read, write_manifest
from deepspeed_ds4sci.checkpoint.table_files import load_whole, save_whole, saved_table
from deepspeed_ds4sci.checkpoint.universal_files import write_universal_table
from deepspeed_ds4sci.checkpoint.unpartitioned import write_unpartitioned


def to_universal(folder: Path | str, out: Path | str | None = None) -> Path:
    """Converts the checkpoint DIR/TAG for a run with `"checkpoint": {"load_universal": true}`; Adam or AdamW.

    Args:
        folder: DIR/TAG.
        out: default: DIR/TAG_universal. DIR/latest_universal, if out is in DIR, then names it.

    Returns:
        out.

    Raises:
        ValueError: there is no such checkpoint, a file is missing or damaged, its optimizer is not Adam, or `out`
            exists. Without ZeRO also: see `write_unpartitioned`.
    """
    folder = Path(folder)
    out = folder.with_name(f"{folder.name}_universal") if out is None else Path(out)
    folder = folder_to_read(folder)
    if out.exists():
        raise ValueError(f"{out} exists already")
    manifest = check_files(folder)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if list(folder.glob("*_optim_states.pt")):
        _convert(folder, partial)
    else:
        write_unpartitioned(folder, partial, (manifest or {}).get("parameter_groups"))
    table = saved_table(folder)
    if table is not None:
        write_universal_table(table, partial)
    _for_every_stage(partial)
    # Random states go on only where every rank finds its own: with as many ranks as before.
    for path in folder.glob("ds4sci_*"):
        if not path.name.startswith(("ds4sci_position_table", "ds4sci_checkpoint")):
            shutil.copy2(path, partial)
    write_manifest(partial, universal=True)
    partial.rename(out)
    (out.parent / "latest_universal").write_text(out.name)  # DeepSpeed named the folder that it wrote to
    return out


def _convert(folder, out):
    """DeepSpeed's conversion, of ZeRO 1 to 3."""
    from deepspeed.checkpoint import ds_to_universal

    try:
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(folder),
                output_folder=str(out),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    except KeyError as error:
        raise ValueError(
            f"{folder} has optimizer states without {error}; a universal checkpoint has Adam's"
        ) from error


def _for_every_stage(folder):
    """Completes DeepSpeed's files: what stages 1 and 2 read has the name, the form and the keys of stage 3's too, and
    the other way round."""
    plain, partitioned = folder / "mp_rank_00_model_states.pt", folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    shutil.copy2(*((plain, partitioned) if plain.exists() else (partitioned, plain)))
    shapes = {}
    for group in _own(plain)["param_shapes"]:
        shapes.update(group)
    step = _optimizer_state(folder)
    for name, shape in shapes.items():
        parameter = folder / "zero" / name
        for path in parameter.glob("*.pt"):
            content = _own(path)
            if isinstance(content, torch.Tensor) and path.stem != "step":  # flat, as stage 3 takes it
                save_whole({"param": content.view(shape), "cat_dim": 0}, path)
        if not (parameter / "step.pt").exists():
            save_whole(step, parameter / "step.pt")


def _optimizer_state(folder):
    """Completes the file of the optimizer's settings, and returns its number of steps."""
    path = folder / "zero" / "optimizer_state.pt"
    state = _own(path)
    if "optimizer_state_dict" in state:  # stage 3
        inner = state["optimizer_state_dict"]
        state["fp32_flat_groups"] = []  # in the parameters' own files
        step = inner["state"][0]["step"]
        inner["state"] = {0: {"step": step}}
    else:
        step = next(_own(each) for each in sorted(folder.glob("zero/*/step.pt")))
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": state["param_groups"]}
    state.setdefault("ds_version", _version())
    save_whole(state, path)
    return step


def _version():
    import deepspeed

    return deepspeed.__version__


def _own(path):
    """Of a file that DeepSpeed wrote a moment ago."""
    return load_whole(path, plain=False)

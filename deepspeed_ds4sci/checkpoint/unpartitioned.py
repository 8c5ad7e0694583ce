# SPDX-License-Identifier: Apache-2.0
"""Checkpoints saved without ZeRO (stage 0) as DeepSpeed's universal ones, which DeepSpeed does not convert.

They hold the whole optimizer's state dict, numbered; the names that the numbers stand for are in the manifest.
"""

from pathlib import Path

import torch

from deepspeed_ds4sci.checkpoint.table_files import load_whole, save_whole
from deepspeed_ds4sci.checkpoint.universal_files import ADAM, save_parameter

_OTHERWISE = "load it at stage 0, or pass load_optimizer_states=False to take the weights alone"


def write_unpartitioned(folder: Path, out: Path, groups: list[list[str]] | None) -> None:
    """Writes the weights and Adam states of a checkpoint of stage 0, fp32 or bf16, in the form of stages 1 and 2.

    Args:
        folder: of the checkpoint.
        out: of the universal checkpoint.
        groups: names of the parameters of each of the optimizer's groups, in its order.

    Raises:
        ValueError: the checkpoint has no Adam states, or some that ZeRO has no place for.
    """
    import deepspeed

    path = folder / "mp_rank_00_model_states.pt"
    if not path.is_file():
        raise ValueError(f"the checkpoint {folder} lacks the file {path.name}")
    content = load_whole(path, plain=False)
    weights, optimizer = content["module"], content.get("optimizer")
    if groups is None or not optimizer:
        raise ValueError(f"{folder} has no optimizer states, or none whose parameters' names were saved; {_OTHERWISE}")
    if any(weights[name].dtype == torch.float16 for names in groups for name in names):
        raise ValueError(f"{folder} is of fp16, whose loss scale has another form with ZeRO; {_OTHERWISE}")
    states = parameter_states(optimizer, groups, weights)
    step = _common_step(states, folder)
    for name, state in states.items():
        for key in ADAM:  # a parameter that never had a gradient has none without ZeRO, and zeros with it
            state.setdefault(key, torch.zeros_like(state["fp32"]))
        save_parameter(out, name, {**state, "step": step})
    inner = optimizer.get("optimizer_state_dict", optimizer)
    save_whole(
        {"param_groups": inner["param_groups"], "ds_version": deepspeed.__version__}, out / "zero/optimizer_state.pt"
    )
    shapes = [{name: weights[name].shape for name in names} for names in groups]
    save_whole({**content, "optimizer": None, "param_shapes": shapes}, out / path.name)


def parameter_states(optimizer: dict, groups: list[list[str]], weights: dict) -> dict[str, dict[str, torch.Tensor]]:
    """{parameter: {"fp32": its fp32 weight, and the optimizer's values}} of a state dict of stage 0.

    DeepSpeed takes the optimizer as it is in fp32, and wraps it in bf16: with an fp32 weight for each parameter, or
    (FusedAdam) with a flat one for each group.

    Args:
        weights: of the model, by name.
    """
    inner = optimizer.get("optimizer_state_dict", optimizer)["state"]
    found, count = {}, 0
    for group, names in enumerate(groups):
        if "fp32_groups_flat" in optimizer:
            flat = {"fp32": optimizer["fp32_groups_flat"][group], **inner.get(group, {})}
            found |= _taken_apart(flat, {name: weights[name].shape for name in names})
            continue
        for position, name in enumerate(names):
            weight = optimizer["fp32_groups"][group][position] if "fp32_groups" in optimizer else weights[name]
            found[name] = {"fp32": weight.detach().float(), **inner.get(count, {})}
            count += 1
    return found


def _taken_apart(flat, shapes):
    found, start = {}, 0
    for name, shape in shapes.items():
        stop = start + shape.numel()
        found[name] = {key: each[start:stop].view(shape) if _is_flat(each) else each for key, each in flat.items()}
        start = stop
    return found


def _is_flat(value):
    return isinstance(value, torch.Tensor) and value.dim() == 1


def _common_step(states, folder):
    keys = {key for state in states.values() for key in state}
    if keys != {"fp32", "step", *ADAM}:
        got = ", ".join(sorted(keys - {"fp32"})) or "none"
        raise ValueError(
            f"{folder} must have Adam's optimizer states (exp_avg, exp_avg_sq, step), got {got}; {_OTHERWISE}"
        )
    steps = {float(state["step"]): state["step"] for state in states.values() if "step" in state}
    if len(steps) != 1:
        raise ValueError(
            f"{folder} has parameters that took different numbers of optimizer steps, {sorted(steps)}; with ZeRO all "
            f"have one; {_OTHERWISE}"
        )
    return next(iter(steps.values()))

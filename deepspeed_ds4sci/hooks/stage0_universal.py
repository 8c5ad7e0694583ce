# SPDX-License-Identifier: Apache-2.0
"""A universal checkpoint into an engine without ZeRO (stage 0), which DeepSpeed's load has no way for: it skips the
weights, and takes the optimizer states from where a universal checkpoint has none."""

import torch

from deepspeed_ds4sci.checkpoint.table_files import load_whole
from deepspeed_ds4sci.checkpoint.universal_files import saved_shape, saved_state


def names_by_group(engine) -> list[list[str]] | None:
    """The optimizer's parameters in its order, by which its state dict numbers them; None: there is no optimizer."""
    optimizer = engine.optimizer
    if optimizer is None:
        return None
    # The wrappers of 16-bit weights have their parameters in place of the model's in the optimizer's groups.
    groups = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in optimizer.param_groups]
    return [[engine.param_names[parameter] for parameter in group] for group in groups]


class Stage0Universal:
    """The universal checkpoint in `folder`, for an engine at stage 0."""

    def __init__(self, engine, folder):
        self.engine, self.folder = engine, folder

    def check(self, optimizer_states: bool) -> None:
        """Raises ValueError for what `load` could not take. Changes nothing."""
        for name, parameter in self.engine.module.named_parameters():
            shape = saved_shape(self.folder, name)
            if shape is None:
                raise ValueError(f"the universal checkpoint {self.folder} lacks the parameter {name}")
            if shape != parameter.shape:
                raise ValueError(
                    f"the saved parameter {name} must be {list(parameter.shape)}, got {list(shape)} in {self.folder}"
                )
        if not optimizer_states or self.engine.optimizer is None:
            return
        if self.engine.fp16_enabled():
            raise ValueError(
                "optimizer states of a universal checkpoint do not go into stage 0 with fp16, whose loss scale has "
                "another form there; load them at stage 1 to 3, or pass load_optimizer_states=False"
            )
        saved, wanted = len(self._saved_groups()), len(self.engine.basic_optimizer.param_groups)
        if saved != wanted:
            raise ValueError(f"the saved optimizer must have {wanted} parameter groups, got {saved} in {self.folder}")

    def load(self, original, arguments: dict, optimizer_states: bool):
        """Loads what DeepSpeed can, with `original`, and weights and optimizer states; returns what `original` does.

        Args:
            original: the engine's load_checkpoint.
            arguments: of the call.
        """
        engine = self.engine
        tag = str(self.folder.relative_to(arguments["load_dir"]))
        arguments |= {"tag": tag, "load_optimizer_states": False, "custom_load_fn": self._fill}
        engine.load_universal_checkpoint = lambda: False  # it hides the method
        try:
            path, client_state = original(**arguments)
        finally:
            del engine.load_universal_checkpoint
        client_state.pop("optimizer", None)  # of the stage that it was saved at
        if optimizer_states and engine.optimizer is not None:
            self._load_optimizer()
        elif hasattr(engine.optimizer, "refresh_fp32_params"):
            engine.optimizer.refresh_fp32_params()
        return path, client_state

    @torch.no_grad()
    def _fill(self, src, dst):
        """DeepSpeed's custom_load_fn: src: the state dict in the checkpoint, dst: the model."""
        for name, parameter in dst.named_parameters():
            parameter.copy_(saved_state(self.folder, name, optimizer_states=False)["fp32"])
        for name, buffer in dst.named_buffers():
            if name in src:  # not all are saved
                buffer.copy_(src[name])

    def _load_optimizer(self):
        engine = self.engine
        groups, content = names_by_group(engine), engine.optimizer.state_dict()
        states = {name: saved_state(self.folder, name, optimizer_states=True) for names in groups for name in names}
        weights = {name: state.pop("fp32") for name, state in states.items()}
        for state in states.values():
            state["step"] = self._step(state["step"])
        inner = content.get("optimizer_state_dict", content)
        if "fp32_groups_flat" in content:
            content["fp32_groups_flat"] = [_joined(weights[name] for name in names) for names in groups]
            numbered = [_joined_states([states[name] for name in names]) for names in groups]
        else:
            numbered = [states[name] for names in groups for name in names]
        if "fp32_groups" in content:
            content["fp32_groups"] = [[weights[name] for name in names] for names in groups]
        inner["state"] = dict(enumerate(numbered))
        inner["param_groups"] = [
            {**own, **{key: value for key, value in saved.items() if key != "params"}}
            for own, saved in zip(inner["param_groups"], self._saved_groups(), strict=True)
        ]
        engine.optimizer.load_state_dict(content)

    def _step(self, step):
        """torch's optimizers count in a tensor, DeepSpeed's in a number."""
        own = type(self.engine.basic_optimizer).__module__.startswith("torch.")
        return torch.tensor(float(step)) if own else int(step)

    def _saved_groups(self):
        # It has objects of DeepSpeed's where it was converted from ZeRO.
        return load_whole(self.folder / "zero" / "optimizer_state.pt", plain=False)["param_groups"]


def _joined(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def _joined_states(states):
    first = states[0]
    return {key: value if key == "step" else _joined(each[key] for each in states) for key, value in first.items()}

# SPDX-License-Identifier: Apache-2.0
"""What a script under the `deepspeed` launcher needs around its own loop."""

import json
import resource
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


def load_config(path: Path, steps: int, output: Path | None = None) -> dict:
    """The DeepSpeed JSON config with the length of its schedule set to `steps`; TensorBoard files go to `output`."""
    config = json.loads(path.read_text())
    parameters = config.get("scheduler", {}).get("params", {})
    if "total_num_steps" in parameters:
        parameters["total_num_steps"] = steps
        parameters["warmup_num_steps"] = min(parameters["warmup_num_steps"], max(2, steps // 4))
    if output is not None and config.get("tensorboard", {}).get("enabled"):
        config["tensorboard"].setdefault("output_path", str(output))
    return config


def prepare_cpu() -> None:
    """To be called before `deepspeed.init_distributed`: on CPUs, gloo is used from the start.

    DeepSpeed would compile an op for collectives within a node at first use, over a minute.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # Newer torch versions deprecate the collectives that DeepSpeed and autograd call, at every step.
    warnings.filterwarnings("ignore", "torch.distributed", FutureWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes the random numbers of a step depend on nothing that came before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def count_parameters(model: nn.Module) -> int:
    """Parameters, whole ones also where ZeRO-3 has partitioned them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def peak_memory(device: torch.device) -> tuple[float, float]:
    """(device, host) GiB, the largest of all ranks: allocated on the GPU (0 on a CPU), resident in the process."""
    from deepspeed.accelerator import get_accelerator

    on_device = 0 if device.type == "cpu" else get_accelerator().max_memory_allocated()
    on_host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    values = torch.tensor([on_device / 2**30, on_host / 2**30], device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return tuple(values.tolist())


def refresh_seconds() -> float:
    """Of a progress bar: often on a terminal, seldom in a log file."""
    return 1.0 if sys.stderr.isatty() else 20.0


def resume(engine, output: Path, run: dict) -> dict:
    """Loads the last checkpoint in `output`; returns the client state that was saved with it.

    Args:
        run: what must be as in the run that the checkpoint is of; it was saved as client state "run".

    Raises:
        ValueError: there is no checkpoint, or it is of another run; the message says what differs.
    """
    path, state = engine.load_checkpoint(str(output / "checkpoints"))
    if path is None:
        raise ValueError(f"--resume needs a checkpoint, got none in {output / 'checkpoints'}")
    saved = state["run"]
    changed = [f"{name} = {saved.get(name)!r}, got {run[name]!r}" for name in run if saved.get(name) != run[name]]
    if changed:
        raise ValueError(f"--resume must continue the same run; the checkpoint has {'; '.join(changed)}")
    return state

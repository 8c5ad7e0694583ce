# SPDX-License-Identifier: Apache-2.0
"""The path of a `ds4sci` block through DeepSpeed: read where DeepSpeed reads its config, applied around its engine.

`plugin.py` puts `read_config` behind `DeepSpeedConfig._initialize_params`, before DeepSpeed computes batch sizes, and
`wrap_init` around `DeepSpeedEngine.__init__`. `deepspeed_ds4sci.initialize` goes the same way, so both together apply
once.
"""

import functools
import inspect
import logging
import os

import torch
import torch.distributed as dist

from deepspeed_ds4sci.config import check_combinations, read_block
from deepspeed_ds4sci.hooks.context import HookContext
from deepspeed_ds4sci.hooks.engine_checkpoint import install_checkpoint
from deepspeed_ds4sci.hooks.removal import detach, remove_all

logger = logging.getLogger(__name__)


def read_config(deepspeed_config, ds_config: dict) -> None:
    """Types and checks the block; sets the data-parallel size, which batch arithmetic divides by.

    Args:
        deepspeed_config: the DeepSpeedConfig in the making; gets the attribute `ds4sci`.
        ds_config: the dict it is made from.
    """
    config = deepspeed_config.ds4sci = read_block(ds_config)
    if config is None:
        return
    check_combinations(config, ds_config)
    size = config.sequence_parallel.size
    if size == 1 or not dist.is_initialized():
        return  # outside of a launch DeepSpeed computes with one rank
    world = dist.get_world_size()
    if world % size:
        raise ValueError(f"ds4sci.sequence_parallel.size must divide the number of ranks = {world}, got {size}")
    if deepspeed_config.world_size == world:
        deepspeed_config.world_size = world // size


def wrap_init(original):
    """DeepSpeedEngine.__init__ with the hooks before and after it, where the config has a block that asks for any."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        call = signature.bind(self, *args, **kwargs)
        deepspeed_config = call.arguments.get("config_class")
        config = getattr(deepspeed_config, "ds4sci", None)
        model = call.arguments["model"]
        detach(model)
        if config is None or not config.enabled():
            original(self, *args, **kwargs)
            return
        handles = model.ds4sci_handles = []
        try:
            context = _before(config, deepspeed_config, call.arguments, handles)
            original(*call.args, **call.kwargs)
            install_checkpoint(self, context)
            for hook in _enabled(config):
                hook.after_engine(self, context)
        except BaseException:
            remove_all(handles)
            raise
        self.register_forward_pre_hook(functools.partial(_refuse_after_removal, handles))

    return __init__


def _before(config, deepspeed_config, arguments, handles):
    model = arguments["model"]
    _refuse(model, arguments)
    _use_own_device(arguments.get("args"))
    parameters = arguments.get("model_parameters")
    context = HookContext(
        config=config,
        model_dtype=_model_dtype(deepspeed_config),
        client_optimizer=arguments.get("optimizer"),
        model_parameters=None if parameters is None else list(parameters),
        handles=handles,
    )
    for hook in _enabled(config):
        change = hook.before_engine(model, context)
        if change.count == 0:
            raise ValueError(f"ds4sci.{hook.name} is enabled but changes nothing in {type(model).__name__}")
        if dist.get_rank() == 0:
            logger.info("ds4sci.%s: %s", hook.name, change.text)
    arguments["model_parameters"] = context.model_parameters
    if context.mpu is not None:
        arguments["mpu"] = context.mpu
    return context


def _refuse_after_removal(handles, engine, inputs):
    if not handles:
        raise RuntimeError(
            f"{type(engine.module).__name__} was given to another engine, which has undone what the ds4sci block of "
            "this one changed in it; use the new engine, or give each its own copy of the model"
        )


def _use_own_device(args):
    """Makes this rank's device the current one, as DeepSpeed's __init__ will: the hooks communicate before that."""
    from deepspeed.accelerator import get_accelerator

    rank = getattr(args, "device_rank", os.environ.get("LOCAL_RANK"))
    if rank is not None and int(rank) >= 0:
        get_accelerator().set_device(int(rank))


def _enabled(config):
    from deepspeed_ds4sci.hooks import HOOKS

    return [hook for hook in HOOKS if getattr(config, hook.name).enabled()]


def _model_dtype(deepspeed_config):
    if deepspeed_config.bfloat16_config.enabled:
        return torch.bfloat16
    return torch.float16 if deepspeed_config.float16_config.enabled else None


def _refuse(model, arguments):
    from deepspeed.pipe import PipelineModule

    if isinstance(model, PipelineModule):
        raise NotImplementedError("a ds4sci block does not go with PipelineModule: a stage sees no batch to shard")
    if arguments.get("mpu") is not None:
        raise NotImplementedError("a ds4sci block makes its own process groups; leave out the mpu argument")
    if arguments.get("mesh_device") is not None:
        raise NotImplementedError("a ds4sci block makes its own process groups; leave out the mesh_param argument")

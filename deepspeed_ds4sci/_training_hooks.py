# SPDX-License-Identifier: Apache-2.0
"""The hooks into DeepSpeed around training: the `ds4sci` block in its config and its engine, and its offline tools.

`plugin.py` runs them; `replace(container, key, value)` is its way to change DeepSpeed so that it can be put back.
Importing this module runs the standard library only.
"""

import functools
from pathlib import Path


def hook_config(replace, module):
    """The `ds4sci` block is read with DeepSpeed's own keys, before batch sizes are computed."""
    original = module.DeepSpeedConfig._initialize_params

    @functools.wraps(original)
    def _initialize_params(self, param_dict):
        from deepspeed_ds4sci.hooks.engine import read_config

        original(self, param_dict)
        read_config(self, param_dict)

    replace(module.DeepSpeedConfig, "_initialize_params", _initialize_params)


def hook_engine(replace, module):
    """The block's features are applied around DeepSpeedEngine.__init__, which PipelineEngine and others inherit."""
    original = module.DeepSpeedEngine.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        from deepspeed_ds4sci.hooks.engine import wrap_init

        wrap_init(original)(self, *args, **kwargs)

    replace(module.DeepSpeedEngine, "__init__", __init__)


def hook_zero_to_fp32(replace, module):
    """The weights that DeepSpeed puts together from a checkpoint's files include a sharded position table."""
    original = module._get_fp32_state_dict_from_zero_checkpoint

    @functools.wraps(original)
    def _get_fp32_state_dict_from_zero_checkpoint(ds_checkpoint_dir, *args, **kwargs):
        from deepspeed_ds4sci.checkpoint.export import add_table

        state = original(ds_checkpoint_dir, *args, **kwargs)
        add_table(state, Path(ds_checkpoint_dir))
        return state

    replace(module, "_get_fp32_state_dict_from_zero_checkpoint", _get_fp32_state_dict_from_zero_checkpoint)


def hook_builder(replace, module):
    """DeepSpeed's just-in-time builds say it when they wait for a lock that nobody may hold any more."""
    original = module.OpBuilder.jit_load

    @functools.wraps(original)
    def jit_load(self, *args, **kwargs):
        from deepspeed_ds4sci._build_locks import warn_of_old_lock

        warn_of_old_lock(self.name)
        return original(self, *args, **kwargs)

    replace(module.OpBuilder, "jit_load", jit_load)


HOOKS = {
    "deepspeed.ops.op_builder.builder": hook_builder,
    "deepspeed.runtime.config": hook_config,
    "deepspeed.runtime.engine": hook_engine,
    "deepspeed.utils.zero_to_fp32": hook_zero_to_fp32,
}

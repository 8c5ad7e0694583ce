# SPDX-License-Identifier: Apache-2.0
"""The hook of `ds4sci.activation_checkpointing`: layers, or parts of them, computed again in the backward pass."""

import contextlib
import functools
import inspect

import torch
from torch.utils.checkpoint import checkpoint, noop_context_fn

from deepspeed_ds4sci.hooks.checkpoint_offload import CheckpointOffload
from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import family_of
from deepspeed_ds4sci.hooks.removal import replace_attribute
from deepspeed_ds4sci.sequence.kept import keeping_contexts
from deepspeed_ds4sci.sequence.tiling import load_checkpointing

_PARTS = {
    "full": "whole layers",
    "selective": "the attention of layers",
    "keep_attention": "layers without their attention outputs, which are kept,",
}


class ActivationCheckpointingHook:
    name = "activation_checkpointing"

    def before_engine(self, model, context):
        load_checkpointing()
        block = context.config.activation_checkpointing
        family = family_of(model)
        chosen = family.layers(model)[:: block.every_n_layers]
        if block.kind == "selective":
            targets = [target for layer in chosen for target in _attention_of(family, layer)]
        else:
            targets = [(layer, "forward") for layer in chosen]
        offload = CheckpointOffload() if block.cpu_offload else None
        # Apart from what layers start from: each comes back one layer ahead.
        attention_offload = CheckpointOffload() if block.cpu_offload_attention else None
        context.extras[self.name] = offload, attention_offload
        keep = functools.partial(_contexts, block.kind == "keep_attention", attention_offload)
        for module, name in targets:
            forward = getattr(module, name)
            recomputed = _recomputed(forward, context.sequence, keep, offload)
            context.handles.append(replace_attribute(module, name, recomputed))
        if "use_cache" in inspect.signature(model.forward).parameters:
            context.handles.append(model.register_forward_pre_hook(_without_cache, with_kwargs=True))
        waiting = {"what they start from": block.cpu_offload, "what attention returned": block.cpu_offload_attention}
        waiting = [what for what, waits in waiting.items() if waits]
        where = f"; {' and '.join(waiting)} wait{'s' * (len(waiting) < 2)} in CPU memory" if waiting else ""
        return Change(
            len(targets),
            f"{_PARTS[block.kind]} are recomputed in the backward pass: {len(targets)} of every "
            f"{block.every_n_layers}{where}",
        )

    def after_engine(self, engine, context):
        engine.ds4sci_checkpoint_offload, engine.ds4sci_attention_offload = context.extras[self.name]


def _attention_of(family, layer):
    if type(layer).__name__ == family.attention:  # our decoder attends in a method of its layer
        return [(layer, "_attention")]
    return [(module, "forward") for module in family.attention_modules(layer)]


def _without_cache(model, args, kwargs):
    """No key/value cache in training: it would hold every layer's keys, and recomputation would add them again."""
    if not torch.is_grad_enabled():
        return args, kwargs
    if kwargs.get("use_cache"):
        raise ValueError("use_cache = True does not go with ds4sci.activation_checkpointing in training; leave it out")
    if "use_cache" in kwargs or not model.config.use_cache:
        return args, {**kwargs, "use_cache": False}
    # Without a cache transformers would read documents off these position ids, which it does not with one.
    if kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None:
        tokens = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
        kwargs = {**kwargs, "attention_mask": torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)}
    return args, {**kwargs, "use_cache": False}


def _contexts(keep_attention, offload):
    """Of one checkpointed call; see `keeping_contexts`."""
    if not keep_attention:
        return noop_context_fn()
    return keeping_contexts(None if offload is None else offload.leave)


def _recomputed(forward, state, keep, offload):
    """`forward` of a module under torch's checkpointing, with the batch of its own forward pass while it is computed
    again. A copy of the module gets one of its own: no closure, which would go on with the original's weights."""
    run = functools.partial(_run, forward, state, keep, offload)
    return functools.update_wrapper(run, forward)


def _run(forward, state, keep, offload, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    batch = None if state is None else state.batch

    def run(hidden, *args, **kwargs):
        if state is not None:
            state.batch = batch
        return forward(hidden, *args, **kwargs)

    # Layers are called with what they start from first; some models name it.
    hidden, *args = args or (kwargs.pop("hidden_states"),)
    contexts = keep()
    with contextlib.nullcontext() if offload is None else offload.of(hidden):
        output = checkpoint(run, hidden, *args, use_reentrant=False, context_fn=lambda: contexts, **kwargs)
    if getattr(contexts[0], "count", None) == 0:
        raise NotImplementedError(
            'ds4sci.activation_checkpointing.kind = "keep_attention" met no attention whose output it can keep in '
            f"{getattr(forward, '__qualname__', forward)}: it knows PyTorch's fused kernels, the tiled and "
            'ring attention of this package and "flash_attn_4"; choose another ds4sci.attention.implementation, or '
            'kind "full"'
        )
    return output

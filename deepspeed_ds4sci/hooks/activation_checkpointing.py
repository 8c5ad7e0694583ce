# SPDX-License-Identifier: Apache-2.0
"""The hook of `ds4sci.activation_checkpointing`: layers, or their attention, computed again in the backward pass."""

import functools

from torch.utils.checkpoint import checkpoint

from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import family_of


class ActivationCheckpointingHook:
    name = "activation_checkpointing"

    def before_engine(self, model, context):
        block = context.config.activation_checkpointing
        family = family_of(model)
        chosen = family.layers(model)[:: block.every_n_layers]
        if block.kind == "full":
            targets = [(layer, "forward") for layer in chosen]
        else:
            targets = [target for layer in chosen for target in _attention_of(family, layer)]
        for module, name in targets:
            setattr(module, name, _recomputed(getattr(module, name), context))
        part = "whole layers" if block.kind == "full" else "the attention of layers"
        return Change(
            len(targets), f"{part} are recomputed in the backward pass: {len(targets)} of every {block.every_n_layers}"
        )

    def after_engine(self, engine, context):
        """Nothing is left to do."""


def _attention_of(family, layer):
    if type(layer).__name__ == family.attention:  # our decoder attends in a method of its layer
        return [(layer, "_attention")]
    return [(module, "forward") for module in family.attention_modules(layer)]


def _recomputed(forward, context):
    """`forward` under torch's checkpointing, with the batch of its own forward pass while it is computed again."""

    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        state = context.sequence
        batch = None if state is None else state.batch

        def run(*args, **kwargs):
            if state is not None:
                state.batch = batch
            return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    return wrapped

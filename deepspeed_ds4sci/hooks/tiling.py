# SPDX-License-Identifier: Apache-2.0
"""The hook of `ds4sci.tiling`: feed-forward layers and the loss, some tokens at a time."""

from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import GenSLMFamily, family_of
from deepspeed_ds4sci.sequence.tiling import load_checkpointing


class TilingHook:
    name = "tiling"

    def before_engine(self, model, context):
        block = context.config.tiling
        if not isinstance(family_of(model), GenSLMFamily):
            raise NotImplementedError(
                f"ds4sci.tiling works with the decoder of deepspeed_ds4sci.models, got {type(model).__name__}"
            )
        load_checkpointing()
        done = []
        if block.mlp:
            model.mlp_tile = block.mlp
            done.append(f"the feed-forward layers take {block.mlp} tokens at a time")
        if block.loss:
            model.loss_tile = block.loss
            done.append(f"the output layer and the loss take {block.loss} tokens at a time")
        return Change(len(done), "; ".join(done))

    def after_engine(self, engine, context):
        """Nothing is left to do."""

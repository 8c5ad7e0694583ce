# SPDX-License-Identifier: Apache-2.0
"""The hook of `ds4sci.tiling`: feed-forward layers and the loss, some tokens at a time."""

import functools

from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import GenSLMFamily, family_of
from deepspeed_ds4sci.hooks.removal import replace_attribute
from deepspeed_ds4sci.hooks.tiled_loss import TiledLoss
from deepspeed_ds4sci.sequence.tiling import load_checkpointing, tiled


class TilingHook:
    name = "tiling"

    def before_engine(self, model, context):
        block, family = context.config.tiling, family_of(model)
        load_checkpointing()
        done = []
        if block.mlp:
            count = _tile_feed_forwards(model, family, block.mlp, context.handles)
            done.append((count, f"{count} feed-forward layers take {block.mlp} tokens of each sequence at a time"))
        if block.loss:
            _tile_loss(model, family, block.loss, context)
            done.append((1, f"the output layer and the loss take {block.loss} tokens at a time"))
        # One part without effect is as wrong as a hook without.
        return Change(min(count for count, _ in done), "; ".join(text for _, text in done))

    def after_engine(self, engine, context):
        """Nothing is left to do."""


def _tile_feed_forwards(model, family, tile, handles):
    if isinstance(family, GenSLMFamily):
        handles.append(replace_attribute(model, "mlp_tile", tile))
        return len(family.layers(model))
    targets = family.feed_forwards(model)
    for module, name in targets:
        # Not a closure: a copy of the model gets tiles of its own modules.
        in_tiles = functools.partial(tiled, getattr(module, name), tile=tile)
        handles.append(replace_attribute(module, name, in_tiles))
    return len(targets)


def _tile_loss(model, family, tile, context):
    if isinstance(family, GenSLMFamily):
        context.handles.append(replace_attribute(model, "loss_tile", tile))
        return
    head = family.head(model)
    if head is None:
        raise NotImplementedError(
            f"ds4sci.tiling.loss needs a model that makes logits and a loss of every token, got {type(model).__name__}"
        )
    refuse = functools.partial(family.refuse_other_losses, feature="tiling.loss")
    refuse(model)
    split = context.sequence if context.groups is not None else None
    loss = TiledLoss(head.forward, tile, family.is_causal(model), refuse, split)
    context.handles += [replace_attribute(head, "forward", loss.forward), *loss.register(model)]

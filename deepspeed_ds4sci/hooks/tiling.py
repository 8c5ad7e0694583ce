# SPDX-License-Identifier: Apache-2.0
"""The hook of `ds4sci.tiling`: feed-forward layers and the loss, some tokens at a time."""

import functools

from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import GenSLMFamily, family_of
from deepspeed_ds4sci.hooks.family import OnRemoval, remove_all
from deepspeed_ds4sci.hooks.tiled_loss import TiledLoss
from deepspeed_ds4sci.sequence.tiling import load_checkpointing, tiled


class TilingHook:
    name = "tiling"

    def before_engine(self, model, context):
        block, family = context.config.tiling, family_of(model)
        remove_all(getattr(model, "ds4sci_tiling", []))  # of an earlier engine
        handles = model.ds4sci_tiling = []
        load_checkpointing()
        done = []
        if block.mlp:
            count = _tile_feed_forwards(model, family, block.mlp, handles)
            done.append((count, f"{count} feed-forward layers take {block.mlp} tokens of each sequence at a time"))
        if block.loss:
            _tile_loss(model, family, block.loss, context, handles)
            done.append((1, f"the output layer and the loss take {block.loss} tokens at a time"))
        # One part without effect is as wrong as a hook without.
        return Change(min(count for count, _ in done), "; ".join(text for _, text in done))

    def after_engine(self, engine, context):
        """Nothing is left to do."""


def _tile_feed_forwards(model, family, tile, handles):
    if isinstance(family, GenSLMFamily):
        _set(model, "mlp_tile", tile, handles)
        return len(family.layers(model))
    targets = family.feed_forwards(model)
    for module, name in targets:
        # Not a closure: a copy of the model gets tiles of its own modules.
        _set(module, name, functools.partial(tiled, getattr(module, name), tile=tile), handles)
    return len(targets)


def _tile_loss(model, family, tile, context, handles):
    if isinstance(family, GenSLMFamily):
        _set(model, "loss_tile", tile, handles)
        return
    head = family.head(model)
    if head is None:
        raise NotImplementedError(
            f"ds4sci.tiling.loss needs a model that makes logits and a loss of every token, got {type(model).__name__}"
        )
    split = context.sequence if context.groups is not None else None
    loss = TiledLoss(head.forward, tile, family.is_causal(model), split)
    loss.refuse_other_losses(model)
    _set(head, "forward", loss.forward, handles)
    handles += loss.register(model)


def _set(module, name, value, handles):
    handles.append(OnRemoval(functools.partial(setattr, module, name, getattr(module, name))))
    setattr(module, name, value)

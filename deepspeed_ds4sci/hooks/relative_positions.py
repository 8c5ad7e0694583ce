# SPDX-License-Identifier: Apache-2.0
"""Rotary or ALiBi positions in place of a model's own, and rotary angles scaled for longer sequences.

Angles and biases are formed from global positions, so ranks that share a sequence agree with one rank. The code of
transformers stays as it is: the module that makes its angles, or its table, is replaced, and attention of ours does
the rest.
"""

from dataclasses import replace

import torch
from torch import nn

from deepspeed_ds4sci.hooks.attention import attention_state
from deepspeed_ds4sci.hooks.client_parameters import take_out
from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import GenSLMFamily, family_of
from deepspeed_ds4sci.hooks.removal import mark_as_final, replace_attribute
from deepspeed_ds4sci.sequence.alibi import alibi_slopes
from deepspeed_ds4sci.sequence.rotary import RotaryEmbedding, RotaryScaling

_DEFAULT_BASE = 10000.0


def replace_positions(model: nn.Module, context) -> Change:
    """Gives a model the positions that the config asks for.

    Raises:
        ValueError: the model has these positions already, or none that can be scaled.
        NotImplementedError: a model that cannot take them; the message says why.
    """
    block, family, name = context.config.position_embedding, family_of(model), type(model).__name__
    if family.position_table is None and family.rotary is None:
        raise NotImplementedError(f"{name} learns positions in the plane, which nothing here takes the place of")
    own = model.config.position_embedding if isinstance(family, GenSLMFamily) else _own_kind(family)
    kind = own if block.kind == "model" else block.kind
    scaling = _scaling(block.scaling, model)
    if kind == own and scaling is None:
        raise ValueError(f'ds4sci.position_embedding.kind = "{kind}" changes nothing: {name} has them')
    if scaling is not None and kind != "rotary":
        raise ValueError(f"ds4sci.position_embedding.scaling needs rotary positions, {name} has {kind}")
    apply = _in_genslm if isinstance(family, GenSLMFamily) else _in_transformers
    apply(model, family, kind, own, scaling, context)
    how = "" if scaling is None else f", {scaling.kind} scaling by {scaling.factor:g}"
    before = "" if kind == own else f" in place of {own}"
    return Change(1, f"{name} has {kind} positions{before}{how}")


def _own_kind(family):
    return "learned" if family.position_table else "rotary"


def _scaling(block, model):
    if not block.enabled():
        return None
    config = model.config
    trained = getattr(config, "max_positions", None) or getattr(config, "max_position_embeddings", None)
    return RotaryScaling(block.kind, block.factor, block.original_length or trained)


def _in_genslm(model, family, kind, own, scaling, context):
    if scaling is not None and model.config.rotary_scaling is not None:
        raise NotImplementedError("GenSLM was built with rotary_scaling; leave it out there to set it in the config")
    if own == "learned":
        _drop(model, family, None, context)
    config = replace(model.config, position_embedding=kind, rotary_scaling=scaling)
    rotary = RotaryEmbedding(config.rotary_dim, config.rotary_base, scaling) if kind == "rotary" else None
    context.handles += [replace_attribute(model, "config", config), replace_attribute(model, "rotary", rotary)]


def _in_transformers(model, family, kind, own, scaling, context):
    base = family.base(model)
    if own == "rotary" and kind == "rotary":
        angles = _Angles(_rotary(model, getattr(base, family.rotary), scaling))
        context.handles.append(replace_attribute(base, family.rotary, angles))
        return
    state = attention_state(model, context)
    heads = family.heads(model)
    if kind == "alibi":
        state.slopes = alibi_slopes(heads)
    else:
        state.rotary = RotaryEmbedding(model.config.hidden_size // heads, _DEFAULT_BASE, scaling)
    state.refuse_unsupported()
    if own == "learned":
        _drop(model, family, _NoTable(), context)
    else:
        still = _NoRotation(2 * getattr(base, family.rotary).inv_freq.numel())
        context.handles.append(replace_attribute(base, family.rotary, still))


def _rotary(model, module, scaling):
    """The angles of a rotary model of transformers, scaled.

    Raises:
        NotImplementedError: the model's configuration scales them already.
    """
    parameters = getattr(model.config, "rope_parameters", None) or {}
    if parameters.get("rope_type", "default") != "default":
        raise NotImplementedError(
            f"{type(model).__name__} was built with rotary scaling {parameters['rope_type']!r}; leave it out there to "
            "set it in the config"
        )
    base = parameters.get("rope_theta", getattr(model.config, "rope_theta", _DEFAULT_BASE))
    return RotaryEmbedding(2 * module.inv_freq.numel(), base, scaling)


def _drop(model, family, replacement, context):
    """Puts `replacement` where the learned table is; its weight leaves the script's parameters too."""
    base = family.base(model)
    weight = getattr(base, family.position_table).weight
    if hasattr(weight, "ds_id"):
        raise NotImplementedError(
            f"{family.position_table} was built under deepspeed.zero.Init, which has partitioned it; build the model "
            "outside of it to replace its positions"
        )
    if weight.requires_grad:
        take_out(weight, context)
    mark_as_final(model, f"the learned positions of {type(model).__name__} were replaced")
    setattr(base, family.position_table, replacement)


class _Angles(nn.Module):
    """What transformers calls for cosines and sines: [B|1, L, R], both halves alike, in the dtype of x."""

    def __init__(self, rotary: RotaryEmbedding):
        super().__init__()
        self.rotary = rotary

    def forward(self, x, position_ids, layer_type=None):
        return tuple(torch.cat((half, half), -1) for half in self.rotary(position_ids, x.dtype))


class _NoRotation(nn.Module):
    """Cosines of 1 and sines of 0: queries and keys stay as they are."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x, position_ids, layer_type=None):
        ones = x.new_ones(*position_ids.shape, self.dim)
        return ones, torch.zeros_like(ones)


class _NoTable(nn.Module):
    """Adds nothing to the embeddings."""

    def forward(self, position_ids):
        return torch.zeros((), device=position_ids.device)

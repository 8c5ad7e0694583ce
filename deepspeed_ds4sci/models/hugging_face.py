# SPDX-License-Identifier: Apache-2.0
"""Weights of GenSLM-style decoders under Hugging Face's names: GPT-NeoX where rotary, GPT-2 where learned positions.

The published GenSLM weights have these formats. Only tensors are renamed and reordered; transformers is not needed.
"""

from collections.abc import Callable, Mapping

import torch

from deepspeed_ds4sci.models.configs import GenSLMConfig

Tensors = Mapping[str, torch.Tensor]


def architecture(config: GenSLMConfig) -> str:
    """The class of transformers that computes what this configuration computes.

    Raises:
        NotImplementedError: there is none; the message names the field.
    """
    name = {"rotary": "GPTNeoXForCausalLM", "learned": "GPT2LMHeadModel"}.get(config.position_embedding)
    if name is None:
        raise NotImplementedError(f"no Hugging Face model of these families has {config.position_embedding} positions")
    wanted = dict(causal=True, key_value_heads=config.num_heads, window=None, rotary_scaling=None)
    if name == "GPT2LMHeadModel":
        wanted.update(parallel_residual=False, activation="gelu_tanh", tie_embeddings=True)
    elif int(config.head_dim * config.rotary_fraction) % 2:
        raise NotImplementedError(
            f"GPT-NeoX rotates other channels than these {config.rotary_dim}: rotary_fraction of the head dim "
            f"{config.head_dim} is odd"
        )
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise NotImplementedError(f"{name} needs {field} = {value!r}, got {getattr(config, field)!r}")
    return name


def to_hugging_face(state: Tensors, config: GenSLMConfig) -> dict[str, torch.Tensor]:
    """A `GenSLM` state dict under the names, and in the layout, of `architecture(config)`.

    A sharded position table must have been put together before.

    Raises:
        NotImplementedError: see `architecture`.
        ValueError: a tensor is missing.
    """
    return {theirs: to(_taken(state, ours)) for ours, theirs, to, _ in _pairs(config)}


def from_hugging_face(state: Tensors, config: GenSLMConfig) -> dict[str, torch.Tensor]:
    """A state dict for `GenSLM(config)` from one of `architecture(config)`; tensors that are no weights are left out.

    Raises:
        NotImplementedError: see `architecture`.
        ValueError: a tensor is missing.
    """
    # Releases differ in the name of the GPT-NeoX head.
    state = {("lm_head.weight" if name == "embed_out.weight" else name): tensor for name, tensor in state.items()}
    return {ours: back(_taken(state, theirs)) for ours, theirs, _, back in _pairs(config)}


def _taken(state, name):
    if name not in state:
        raise ValueError(f"the state dict has no tensor {name!r}")
    return state[name]


def _pairs(config):
    """(our name, their name, ours -> theirs, theirs -> ours) of every tensor."""
    yield from _NAMES[architecture(config)](config)


def _same(tensor):
    return tensor


def _transposed(tensor):
    return tensor.t().contiguous() if tensor.dim() == 2 else tensor  # GPT-2 keeps [in, out] matrices


def _layer_pairs(config, prefix, names, to: Callable, back: Callable):
    for layer in range(config.num_layers):
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                is_norm = ours.endswith("norm")
                pair = (f"layers.{layer}.{ours}.{kind}", f"{prefix}.{layer}.{theirs}.{kind}")
                yield *pair, _same if is_norm else to, _same if is_norm else back


def _gpt_neox_names(config):
    def by_head(tensor):  # ours: q, k, v, then head; theirs: head, then q, k, v
        return tensor.unflatten(0, (3, config.num_heads, -1)).transpose(0, 1).flatten(0, 2)

    def by_kind(tensor):
        return tensor.unflatten(0, (config.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)

    yield "token_embedding.weight", "gpt_neox.embed_in.weight", _same, _same
    yield "head.weight", "lm_head.weight", _same, _same
    for kind in ("weight", "bias"):
        yield f"final_norm.{kind}", f"gpt_neox.final_layer_norm.{kind}", _same, _same
    prefix = "gpt_neox.layers"
    yield from _layer_pairs(config, prefix, {"query_key_value": "attention.query_key_value"}, by_head, by_kind)
    names = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention_output": "attention.dense",
        "mlp.0": "mlp.dense_h_to_4h",
        "mlp.2": "mlp.dense_4h_to_h",
    }
    yield from _layer_pairs(config, prefix, names, _same, _same)


def _gpt2_names(config):
    yield "token_embedding.weight", "transformer.wte.weight", _same, _same
    yield "head.weight", "lm_head.weight", _same, _same
    yield "position_embedding.weight", "transformer.wpe.weight", _same, _same
    for kind in ("weight", "bias"):
        yield f"final_norm.{kind}", f"transformer.ln_f.{kind}", _same, _same
    names = {
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "query_key_value": "attn.c_attn",
        "attention_output": "attn.c_proj",
        "mlp.0": "mlp.c_fc",
        "mlp.2": "mlp.c_proj",
    }
    yield from _layer_pairs(config, "transformer.h", names, _transposed, _transposed)


_NAMES = {"GPTNeoXForCausalLM": _gpt_neox_names, "GPT2LMHeadModel": _gpt2_names}

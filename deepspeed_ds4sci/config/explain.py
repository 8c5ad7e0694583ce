# SPDX-License-Identifier: Apache-2.0
"""A `ds4sci` block in plain words."""

from pydantic import BaseModel

from deepspeed_ds4sci.config.schema import DS4SciConfig
from deepspeed_ds4sci.sequence.layout import length_multiple


def explain(config: DS4SciConfig, ds_config: dict) -> list[str]:
    """One sentence per decision, then every setting that differs from its default with its meaning."""
    sentences = [
        *_sequence_parallel(config, ds_config),
        *_attention(config),
        *_positions(config),
        *_mask(config),
        *_checkpointing(config),
    ]
    if not sentences:
        sentences = ["Every feature is at its default: DeepSpeed runs as it is."]
    return [f"- {sentence}" for sentence in sentences] + list(_settings(config, "ds4sci"))


def _sequence_parallel(config, ds_config):
    parallel = config.sequence_parallel
    if not parallel.enabled():
        return
    how = {"ulysses": "an all-to-all over heads", "ring": "key and value blocks that travel in a ring"}
    mode = parallel.layout_mode()
    words = how[mode] if isinstance(mode, str) else f"an all-to-all of {mode['ulysses']} in a ring of {mode['ring']}"
    yield f"Each sequence is split over {parallel.size} GPUs; attention crosses them by {words}."
    yield (
        f"The number of GPUs must be a multiple of {parallel.size}; batch sizes count sequences, so the data-parallel "
        f"size is the number of GPUs divided by {parallel.size}."
    )
    multiple = length_multiple(parallel.size, mode)
    if parallel.padding == "pad":
        yield f"A length that is no multiple of {multiple} tokens is filled up with masked tokens."
    else:
        yield f"A length that is no multiple of {multiple} tokens is an error."
    if parallel.loss_average == "step":
        yield "The loss is the mean over all valid tokens of an optimizer step."
    else:
        yield "The loss is the mean over the valid tokens of a micro-batch on all GPUs."
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    yield f"ZeRO stage {stage} partitions over all GPUs, those that share a sequence included."


def _positions(config):
    if config.position_embedding.sharded:
        yield (
            f"Each of the {config.sequence_parallel.size} GPUs of a sequence holds its part of the learned position "
            "table, of its gradient and of its optimizer state."
        )
    kind, scaling = config.position_embedding.kind, config.position_embedding.scaling
    if kind in ("rotary", "alibi"):
        name = {"rotary": "rotary positions", "alibi": "ALiBi, a penalty that grows with distance,"}[kind]
        yield f"The model gets {name} in place of those it was built with."
    if scaling.enabled():
        yield f"Rotary angles are scaled ({scaling.kind}) for {scaling.factor:g} times the length trained on."


def _attention(config):
    block = config.attention
    if block.implementation != "fastest":
        yield f'Attention is computed by "{block.implementation}" or, where that cannot be, refused.'
    if block.sliding_window:
        yield f"Each token attends to {block.sliding_window} tokens, itself included."


def _mask(config):
    block = config.attention_mask
    if not block.enabled():
        if block.cpu_threshold != type(block).model_fields["cpu_threshold"].default:
            yield 'attention_mask.cpu_threshold has no effect: with the kind "none" no mask is built.'
        return
    what = {
        "causal": "a causal mask",
        "document": "a mask of documents",
        "custom": f"the mask of {block.rule}" if block.rule else "the mask in the batch",
    }[block.kind]
    yield (
        f"Attention runs under {what}, built for each batch: on the device up to {block.cpu_threshold} tokens, above "
        "in CPU memory, then moved once."
    )
    if config.sequence_parallel.enabled():
        ring = config.sequence_parallel.layout_mode()
        ring = (
            {"ulysses": 1, "ring": config.sequence_parallel.size}.get(ring) if isinstance(ring, str) else ring["ring"]
        )
        yield f"Each GPU holds one of every {ring} rows of it." if ring > 1 else "Each GPU holds all rows of it."


def _checkpointing(config):
    block = config.activation_checkpointing
    if not block.enabled():
        return
    every = "Every layer" if block.every_n_layers == 1 else f"One of every {block.every_n_layers} layers"
    part = {
        "full": "is computed again in the backward pass; what it starts from is kept",
        "selective": "computes its attention again in the backward pass; what attention starts from is kept",
        "keep_attention": "is computed again in the backward pass, but for attention; what it starts from and what "
        "attention returns are kept",
    }[block.kind]
    yield f"{every} {part}."
    if block.cpu_offload:
        yield "What layers start from waits in CPU memory and comes back one layer ahead of the backward pass."
    if block.cpu_offload_attention:
        yield "What attention returns waits in CPU memory and comes back one layer ahead of the backward pass."


def _settings(block, path):
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        if isinstance(field.default, BaseModel):
            yield from _settings(value, f"{path}.{name}")
        elif value != field.default:
            meaning = " ".join((field.description or "").split())
            shown = value.model_dump() if hasattr(value, "model_dump") else value
            yield f"  {path}.{name} = {shown!r} (default {field.default!r}): {meaning}"

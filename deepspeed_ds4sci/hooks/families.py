# SPDX-License-Identifier: Apache-2.0
"""The models that a block works with, and what each family needs beyond sharded inputs.

A model class that is not listed is refused by name; it may pool, generate or compute a loss in ways that are wrong on
a part of the sequence.
"""

import functools
from dataclasses import replace

import torch
from torch import nn

from deepspeed_ds4sci.hooks.family import Family, trains
from deepspeed_ds4sci.hooks.removal import replace_attribute
from deepspeed_ds4sci.hooks.vision import TimmViTFamily, ViTFamily
from deepspeed_ds4sci.models.genslm import shift_labels
from deepspeed_ds4sci.sequence.inputs import ShardedBatch
from deepspeed_ds4sci.sequence.masks import within


class GPT2Family(Family):
    def attach(self, model, state):
        if model.config.add_cross_attention:
            raise NotImplementedError("GPT-2 with cross-attention cannot be split over the sequence")
        super().attach(model, state)


class EsmFamily(Family):
    """ESM-2 scales the embeddings of a sequence by its share of masked tokens: the share of the whole sequence."""

    def attach(self, model, state):
        if model.config.position_embedding_type != "rotary":
            raise NotImplementedError(
                "ESM with position_embedding_type other than rotary (ESM-1) cannot be split over the sequence, got "
                f"{model.config.position_embedding_type!r}"
            )
        if model.config.is_decoder:
            raise NotImplementedError("ESM as a decoder cannot be split over the sequence")
        super().attach(model, state)

    def prepare(self, model, state):
        if getattr(model, "pooler", None) is not None:
            raise NotImplementedError(
                "EsmModel with a pooling layer cannot be split: it pools the first token of each part; build it with "
                "add_pooling_layer=False"
            )
        super().prepare(model, state)
        embeddings = model.base_model.embeddings
        _TokenDropout(embeddings, state).install()

    def head(self, model):
        """The output embeddings are the last part of it."""
        return getattr(model, "lm_head", None)


class GenSLMFamily(Family):
    """Our own decoder, which takes attention and the reduction of the loss from outside."""

    def base(self, model):
        return model

    def heads(self, model):
        return model.config.num_heads

    def window(self, model, state):
        return model.config.window

    def is_causal(self, model):
        return model.config.causal

    def prepare(self, model, state):
        self.attach(model, state)
        state.handles.append(replace_attribute(model, "loss_reduction", functools.partial(_mean_loss, model, state)))

    def attach(self, model, state):
        state.handles.append(replace_attribute(model, "attention", _BatchAttention(state)))
        if state.window:
            state.handles.append(replace_attribute(model, "config", replace(model.config, window=state.window)))

    def shard(self, model, state, arguments):
        self.check_positions(model, arguments)
        mask, documents = self._masks(arguments)
        given = {name: arguments[name] for name in ("input_ids", "position_ids") if name in arguments}
        shifted = arguments.get("shift_labels")
        if "labels" in arguments:
            labels = arguments["labels"]
            shifted = shift_labels(labels, documents) if model.config.causal else labels
        if shifted is not None:
            given["shift_labels"] = shifted
        if isinstance(mask, torch.Tensor):
            given["attention_mask"] = mask
        local, batch = state.sharder.shard(given)
        padding = batch.layout.seq_len - batch.seq_len
        if padding and (documents is not None or not model.config.causal):
            documents = torch.zeros_like(arguments["input_ids"]) if documents is None else documents
            documents = torch.nn.functional.pad(documents, (0, padding), value=-1)
        state.batch = replace(batch, document_ids=documents)
        rows = batch.mask if isinstance(mask, torch.Tensor) else mask and within(mask, batch.seq_len)
        return {**local, "shift_labels": batch.labels, "document_ids": documents, "attention_mask": rows}

    def read(self, model, state, arguments):
        _, documents = self._masks(arguments)
        layout = state.sharder.layout(arguments["input_ids"].shape[1])
        state.batch = ShardedBatch(layout, layout.seq_len, arguments["input_ids"].shape[0], document_ids=documents)
        return arguments

    def _masks(self, arguments):
        """(custom mask or None, [B, S] document ids with padding as -1 or None)."""
        mask, documents = arguments.get("attention_mask"), arguments.get("document_ids")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return mask, documents
        documents = torch.zeros_like(arguments["input_ids"]) if documents is None else documents
        return None, documents.masked_fill(mask == 0, -1)


class _BatchAttention:
    """The attention of `state`, as GenSLM takes it: what the model says holds, unless the batch has a mask that was
    built for it."""

    def __init__(self, state):
        self.state = state
        self.size, self.positions = state.attention.size, state.attention.positions

    def __call__(self, q, k, v, **arguments):
        return self.state.attention(q, k, v, **{**arguments, **self.state.built_mask()})


def _mean_loss(model, state, loss_sum, count):
    return state.mean_loss(loss_sum, count, trains(model))


class _TokenDropout:
    """What EsmEmbeddings does with the attention mask and the masked tokens, with sums over the sequence group."""

    MASK_RATIO_IN_TRAINING = 0.15 * 0.8  # the constant of the ESM-2 models

    def __init__(self, embeddings, state):
        self.embeddings, self.state, self.active = embeddings, state, embeddings.token_dropout
        self.input_ids = None

    def install(self):
        self.state.handles += [
            replace_attribute(self.embeddings, "token_dropout", False),
            self.embeddings.word_embeddings.register_forward_hook(self._scale),
            self.embeddings.register_forward_hook(self._mask),
        ]

    def _scale(self, module, inputs, output):
        if not self.active:
            return output
        (input_ids,) = inputs
        batch = self.state.batch
        masked = input_ids == self.embeddings.mask_token_id
        counts = masked.sum(-1).float()
        torch.distributed.all_reduce(counts, group=self.state.groups.sp_group)
        key_mask = batch.key_mask
        lengths = batch.seq_len if key_mask is None else key_mask.sum(-1).flatten().float()
        observed = counts / lengths
        scaled = output.masked_fill(masked.unsqueeze(-1), 0.0) * (1 - self.MASK_RATIO_IN_TRAINING)
        return (scaled / (1 - observed)[:, None, None]).to(output.dtype)

    def _mask(self, module, inputs, output):
        key_mask = self.state.batch.key_mask
        if key_mask is None:
            return output
        local = self.state.batch.layout.shard(key_mask[:, 0, 0], 1, self.state.groups.sp_rank)
        return (output * local.unsqueeze(-1)).to(output.dtype)


FAMILIES = (
    Family(
        "gpt_neox",
        True,
        "GPTNeoXAttention",
        "GPTNeoXLayer",
        ("GPTNeoXForCausalLM", "GPTNeoXModel"),
        rotary="rotary_emb",
    ),
    GPT2Family("gpt2", True, "GPT2Attention", "GPT2Block", ("GPT2LMHeadModel", "GPT2Model"), "wpe"),
    Family(
        "llama", True, "LlamaAttention", "LlamaDecoderLayer", ("LlamaForCausalLM", "LlamaModel"), rotary="rotary_emb"
    ),
    GenSLMFamily(
        "genslm",
        True,
        "GenSLMLayer",
        "GenSLMLayer",
        ("GenSLM",),
        "position_embedding",
        "rotary",
        mask_says_all=False,
        documents_from="document_ids",
        others=(*Family.others, "document_ids"),
    ),
    EsmFamily(
        "esm",
        False,
        "EsmSelfAttention",
        "EsmLayer",
        ("EsmForMaskedLM", "EsmModel"),
        rotary="rotary_embeddings",
        feed_forward="feed_forward_chunk",
    ),
    ViTFamily(
        "vit",
        False,
        "ViTAttention",
        "ViTLayer",
        ("ViTForImageClassification", "ViTModel"),
        inputs=("pixel_values",),
        others=("labels", "interpolate_pos_encoding"),
    ),
    TimmViTFamily("timm", False, "Attention", "Block", ("VisionTransformer",), inputs=("x",), others=()),
)


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        NotImplementedError: the model's class is not one that can be split.
    """
    name = type(model).__name__
    for family in FAMILIES:
        if name in family.classes:
            return family
    known = ", ".join(each for family in FAMILIES for each in family.classes)
    raise NotImplementedError(
        f"sequences of {name} cannot be split over GPUs, nor can its layers be changed; models that can: {known}"
    )

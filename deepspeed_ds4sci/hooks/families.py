# SPDX-License-Identifier: Apache-2.0
"""The models whose sequences can be split, and what each family needs beyond sharded inputs.

None of their code is edited: attention goes through transformers' own table of attention functions, the rest through
module hooks. A model class that is not listed is refused by name; it may pool, generate or compute a loss in ways
that are wrong on a part of the sequence.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from deepspeed_ds4sci.models.genslm import shift_labels

ATTENTION_NAME = "ds4sci"


@dataclass(frozen=True)
class Family:
    """Models that share their code.

    causal: attention looks back only, and labels are the next tokens.
    attention: class name of the modules that call the attention function; layer: of the repeated blocks.
    classes: class names of the models that may be split.
    position_table: attribute of the base model that is its learned position table, if it has one.
    """

    name: str
    causal: bool
    attention: str
    layer: str
    classes: tuple[str, ...]
    position_table: str | None = None

    def attention_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that attend."""
        return [module for module in model.modules() if type(module).__name__ == self.attention]

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks, in order."""
        return [module for module in model.modules() if type(module).__name__ == self.layer]

    def base(self, model: nn.Module) -> nn.Module:
        """The module whose attribute `position_table` is."""
        return model.base_model

    def is_causal(self, model: nn.Module) -> bool:
        return self.causal

    def shard(self, model: nn.Module, state, arguments: dict) -> dict:
        """This rank's part of the arguments; `state.batch` gets what goes with it."""
        # transformers reads documents off the position ids of a causal model, unless it keeps a cache.
        caches = arguments.get("use_cache", getattr(model.config, "use_cache", False))
        local, state.batch = state.sharder.shard(arguments, packed=self.causal and not caches)
        if "use_cache" in inspect.signature(model.forward).parameters:
            local["use_cache"] = False
        return local

    def loss(self, state, output, training: bool) -> torch.Tensor:
        """The global mean loss of a batch with labels."""
        return state.loss(output["logits"], training)

    def prepare(self, model: nn.Module, state) -> None:
        """Points the model's attention at `state`. Raises NotImplementedError for a variant that cannot be split."""
        register_attention()
        for module in self.attention_modules(model):
            module.ds4sci_sequence = state
        model.config._attn_implementation = ATTENTION_NAME


class GPT2Family(Family):
    def prepare(self, model, state):
        if model.config.add_cross_attention:
            raise NotImplementedError("GPT-2 with cross-attention cannot be split over the sequence")
        super().prepare(model, state)


class EsmFamily(Family):
    """ESM-2 scales the embeddings of a sequence by its share of masked tokens: the share of the whole sequence."""

    def prepare(self, model, state):
        if model.config.position_embedding_type != "rotary":
            raise NotImplementedError(
                "ESM with position_embedding_type other than rotary (ESM-1) cannot be split over the sequence, got "
                f"{model.config.position_embedding_type!r}"
            )
        if model.config.is_decoder:
            raise NotImplementedError("ESM as a decoder cannot be split over the sequence")
        if getattr(model, "pooler", None) is not None:
            raise NotImplementedError(
                "EsmModel with a pooling layer cannot be split: it pools the first token of each part; build it with "
                "add_pooling_layer=False"
            )
        super().prepare(model, state)
        embeddings = model.base_model.embeddings
        _TokenDropout(embeddings, state).install()


class GenSLMFamily(Family):
    """Our own decoder, which takes attention and the reduction of the loss from outside."""

    def base(self, model):
        return model

    def is_causal(self, model):
        return model.config.causal

    def prepare(self, model, state):
        if state.window:
            raise NotImplementedError(
                "ds4sci.attention.sliding_window is the field `window` of GenSLMConfig; set it there, where the model "
                "is built"
            )
        original = model.attention, model.loss_reduction
        model.attention = state.attention
        model.loss_reduction = lambda loss_sum, count: state.mean_loss(loss_sum, count, _trains(model))

        def undo():
            model.attention, model.loss_reduction = original

        state.handles.append(_OnRemoval(undo))

    def shard(self, model, state, arguments):
        tokens, mask = arguments["input_ids"], arguments.get("attention_mask")
        documents = arguments.get("document_ids")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            documents = torch.zeros_like(tokens) if documents is None else documents
            documents, mask = documents.masked_fill(mask == 0, -1), None
        given = {name: arguments[name] for name in ("input_ids", "position_ids") if name in arguments}
        shifted = arguments.get("shift_labels")
        if "labels" in arguments:
            labels = arguments["labels"]
            shifted = shift_labels(labels, documents) if model.config.causal else labels
        if shifted is not None:
            given["shift_labels"] = shifted
        if isinstance(mask, torch.Tensor):
            given["attention_mask"] = mask
        local, state.batch = state.sharder.shard(given)
        padding = state.batch.layout.seq_len - state.batch.seq_len
        if padding and (documents is not None or not model.config.causal):
            documents = torch.zeros_like(tokens) if documents is None else documents
            documents = torch.nn.functional.pad(documents, (0, padding), value=-1)
        rows = state.batch.mask if isinstance(mask, torch.Tensor) else mask
        return {**local, "shift_labels": state.batch.labels, "document_ids": documents, "attention_mask": rows}

    def loss(self, state, output, training):
        return output["loss"]


def _trains(model):
    return model.training and torch.is_grad_enabled()


class _TokenDropout:
    """What EsmEmbeddings does with the attention mask and the masked tokens, with sums over the sequence group."""

    MASK_RATIO_IN_TRAINING = 0.15 * 0.8  # the constant of the ESM-2 models

    def __init__(self, embeddings, state):
        self.embeddings, self.state, self.active = embeddings, state, embeddings.token_dropout
        self.input_ids = None

    def install(self):
        self.embeddings.token_dropout = False
        self.state.handles += [
            self.embeddings.word_embeddings.register_forward_hook(self._scale),
            self.embeddings.register_forward_hook(self._mask),
            _OnRemoval(lambda: setattr(self.embeddings, "token_dropout", self.active)),
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


class _OnRemoval:
    """A handle, like those of module hooks, that runs a function when it is removed."""

    def __init__(self, undo):
        self._undo = undo

    def remove(self):
        self._undo()


FAMILIES = (
    Family("gpt_neox", True, "GPTNeoXAttention", "GPTNeoXLayer", ("GPTNeoXForCausalLM", "GPTNeoXModel")),
    GPT2Family("gpt2", True, "GPT2Attention", "GPT2Block", ("GPT2LMHeadModel", "GPT2Model"), "wpe"),
    Family("llama", True, "LlamaAttention", "LlamaDecoderLayer", ("LlamaForCausalLM", "LlamaModel")),
    GenSLMFamily("genslm", True, "GenSLMLayer", "GenSLMLayer", ("GenSLM",), "position_embedding"),
    EsmFamily("esm", False, "EsmSelfAttention", "EsmLayer", ("EsmForMaskedLM", "EsmModel")),
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
    raise NotImplementedError(f"sequences of {name} cannot be split over GPUs; models that can: {known}")


def register_attention() -> None:
    """Adds our attention function to transformers' table, under ATTENTION_NAME."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ATTENTION_NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' interface: query [B, H, L, D], key and value [B, G, L, D] -> ([B, L, H, D], no weights).

    The masks come from the batch as the script gave it; transformers makes none for an attention of its user's own.
    """
    state = module.ds4sci_sequence
    output = state.attend(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), dropout_p=dropout, scale=scaling
    )
    return output, None

# SPDX-License-Identifier: Apache-2.0
"""The models that a block works with, and what each family needs beyond sharded inputs.

None of their code is edited: attention goes through transformers' own table of attention functions, the rest through
module hooks. A model class that is not listed is refused by name; it may pool, generate or compute a loss in ways
that are wrong on a part of the sequence.
"""

import inspect
from dataclasses import dataclass, replace

import torch
from torch import nn

from deepspeed_ds4sci.models.genslm import shift_labels
from deepspeed_ds4sci.sequence.inputs import ShardedBatch

ATTENTION_NAME = "ds4sci"


@dataclass(frozen=True)
class Family:
    """Models that share their code.

    causal: attention looks back only, and labels are the next tokens.
    attention: class name of the modules that call the attention function; layer: of the repeated blocks.
    classes: class names of the models that may be split.
    position_table: attribute of the base model that is its learned position table, if it has one.
    rotary: attribute of the base model that makes its rotary angles, if it has one.
    mask_says_all: a 4-D attention mask in the batch takes the place of causality, documents and padding; else all of
        them hold together.
    documents_from: the argument that tells documents apart.
    """

    name: str
    causal: bool
    attention: str
    layer: str
    classes: tuple[str, ...]
    position_table: str | None = None
    rotary: str | None = None
    mask_says_all: bool = True
    documents_from: str = "position_ids"

    def attention_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that attend."""
        return [module for module in model.modules() if type(module).__name__ == self.attention]

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks, in order."""
        return [module for module in model.modules() if type(module).__name__ == self.layer]

    def heads(self, model: nn.Module) -> int:
        """Query heads of a layer."""
        return model.config.num_attention_heads

    def window(self, model: nn.Module, state) -> int | None:
        """The sliding window of the model's attention in tokens."""
        return state.window or None

    def base(self, model: nn.Module) -> nn.Module:
        """The module whose attributes `position_table` and `rotary` are."""
        return model.base_model

    def is_causal(self, model: nn.Module) -> bool:
        return self.causal

    def shard(self, model: nn.Module, state, arguments: dict) -> dict:
        """This rank's part of the arguments; `state.batch` gets what goes with it."""
        mask = arguments.get("attention_mask")
        if not (mask is None or isinstance(mask, torch.Tensor)):
            raise ValueError(
                f'an attention_mask that is a function needs ds4sci.attention_mask.kind = "custom" for '
                f"{type(model).__name__}"
            )
        # transformers reads documents off the position ids of a causal model without a mask, unless it keeps a cache.
        caches = arguments.get("use_cache", getattr(model.config, "use_cache", False))
        packed = self.causal and not caches and mask is None
        asked = state.masks is not None and state.masks.kind == "document"
        local, state.batch = state.sharder.shard(arguments, packed=packed or asked)
        return _without_cache(model, local)

    def read(self, model: nn.Module, state, arguments: dict) -> dict:
        """Where one rank has the whole sequence: the arguments for the model; `state.batch` gets what `shard` would
        give it, so that the attention of `state` does what the model's own would."""
        self.shard(model, state, arguments)
        return _without_cache(model, arguments)

    def loss(self, state, output, training: bool) -> torch.Tensor:
        """The global mean loss of a batch with labels."""
        return state.loss(output["logits"], training)

    def prepare(self, model: nn.Module, state) -> None:
        """Points a model whose sequences are split at `state`. Raises NotImplementedError for a variant that cannot
        be split."""
        self.attach(model, state)

    def attach(self, model: nn.Module, state) -> None:
        """Points the model's attention at `state`. Raises NotImplementedError for a variant whose attention differs
        from that of `state`."""
        register_attention()
        for module in self.attention_modules(model):
            module.ds4sci_sequence = state
        model.config._attn_implementation = ATTENTION_NAME


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
        original = model.loss_reduction
        model.loss_reduction = lambda loss_sum, count: state.mean_loss(loss_sum, count, _trains(model))
        state.handles.append(_OnRemoval(lambda: setattr(model, "loss_reduction", original)))

    def attach(self, model, state):
        attention, window = model.attention, model.config.window
        model.attention = _BatchAttention(state)
        if state.window:
            model.config = replace(model.config, window=state.window)

        def undo():
            model.attention, model.config = attention, replace(model.config, window=window)

        state.handles.append(_OnRemoval(undo))

    def shard(self, model, state, arguments):
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
        rows = batch.mask if isinstance(mask, torch.Tensor) else mask
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

    def loss(self, state, output, training):
        return output["loss"]


class _BatchAttention:
    """The attention of `state`, as GenSLM takes it: what the model says holds, unless the batch has a mask that was
    built for it."""

    def __init__(self, state):
        self.state = state
        self.size, self.positions = state.attention.size, state.attention.positions

    def __call__(self, q, k, v, **arguments):
        return self.state.attention(q, k, v, **{**arguments, **self.state.built_mask()})


def _without_cache(model, arguments):
    """No key/value cache: recomputation would add to it, and it holds the keys of all layers."""
    caches = "use_cache" in inspect.signature(model.forward).parameters
    return {**arguments, "use_cache": False} if caches else arguments


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
    ),
    EsmFamily(
        "esm", False, "EsmSelfAttention", "EsmLayer", ("EsmForMaskedLM", "EsmModel"), rotary="rotary_embeddings"
    ),
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


def bound_arguments(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of a call of model.forward by name, without those that are None."""
    signature = inspect.signature(model.forward)
    bound = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return {name: value for name, value in bound.items() if value is not None}


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

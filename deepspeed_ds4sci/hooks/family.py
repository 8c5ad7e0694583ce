# SPDX-License-Identifier: Apache-2.0
"""What models that share their code have in common: where their layers are, and how our attention gets into them.

None of their code is edited: attention goes through transformers' own table of attention functions, the rest through
module hooks.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from deepspeed_ds4sci.hooks.removal import replace_attribute
from deepspeed_ds4sci.sequence.position_table import check_position_ids

ATTENTION_NAME = "ds4sci"


@dataclass(frozen=True)
class Family:
    """Models that share their code.

    causal: attention looks back only, and labels are the next tokens.
    attention: class name of the modules that call the attention function; layer: of the repeated blocks.
    classes: class names of the models that may be split.
    position_table: attribute of the base model that is its learned position table, if it has one.
    rotary: attribute of the base model that makes its rotary angles, if it has one.
    feed_forward: path, inside a layer, of the method that treats tokens one by one between attentions.
    mask_says_all: a 4-D attention mask in the batch takes the place of causality, documents and padding; else all of
        them hold together.
    documents_from: the argument that tells documents apart.
    inputs: arguments of which a batch has one; others: what it may have beside.
    """

    name: str
    causal: bool
    attention: str
    layer: str
    classes: tuple[str, ...]
    position_table: str | None = None
    rotary: str | None = None
    feed_forward: str = "mlp.forward"
    mask_says_all: bool = True
    documents_from: str = "position_ids"
    inputs: tuple[str, ...] = ("input_ids", "inputs_embeds")
    others: tuple[str, ...] = (
        "labels",
        "shift_labels",
        "position_ids",
        "token_type_ids",
        "attention_mask",
    )

    def attention_modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules that attend."""
        return [module for module in model.modules() if type(module).__name__ == self.attention]

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks, in order."""
        return [module for module in model.modules() if type(module).__name__ == self.layer]

    def feed_forwards(self, model: nn.Module) -> list[tuple[nn.Module, str]]:
        """(module, name of its method): what each layer does with tokens one by one, in order."""
        path, _, method = self.feed_forward.rpartition(".")
        return [(layer.get_submodule(path), method) for layer in self.layers(model)]

    def head(self, model: nn.Module) -> nn.Module | None:
        """The module that makes logits of hidden states, token by token; None: the model has none."""
        return model.get_output_embeddings()

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

    def learned_table(self, model: nn.Module) -> nn.Module | None:
        """The model's learned position table, or what has taken its place; None: it has none."""
        return getattr(self.base(model), self.position_table, None) if self.position_table else None

    def check_positions(self, model: nn.Module, arguments: dict) -> None:
        """Refuses a batch with positions beyond a learned table, on every rank: each looks up its own part alone, and
        the others would wait for those that fail. A sharded table checks by itself.

        Raises:
            ValueError: too many tokens, or position_ids outside of the table.
        """
        table = self.learned_table(model)
        if not isinstance(table, nn.Embedding):
            return
        rows, positions = table.num_embeddings, arguments.get("position_ids")
        if positions is not None:
            check_position_ids(positions, rows)
            return
        name = next(name for name in self.inputs if name in arguments)
        if arguments[name].shape[1] > rows:
            raise ValueError(
                f"{name} must have at most {rows} tokens, the rows of the learned position table, got "
                f"{arguments[name].shape[1]}"
            )

    def shard(self, model: nn.Module, state, arguments: dict) -> dict:
        """This rank's part of the arguments; `state.batch` gets what goes with it."""
        self.check_positions(model, arguments)
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

    def finish(self, model: nn.Module, state, output: dict) -> dict:
        """The output of a forward pass on a part of the sequence as the script gets it. Labels given: the global mean
        loss, and no logits. Else every output whole."""
        if state.batch.labels is not None:
            output["loss"] = self.loss(state, output, trains(model))
            for name in output.keys() - {"loss"}:
                output[name] = ShardedOutput()
            # Scripts take the loss as output[0].
            return type(output)(**{name: output[name] for name in ("loss", *(key for key in output if key != "loss"))})
        for name, value in list(output.items()):
            if isinstance(value, torch.Tensor):
                output[name] = state.gather(value)
            elif isinstance(value, (tuple, list)):  # hidden states, a tensor per layer
                output[name] = type(value)(state.gather(each) for each in value)
        return output

    def loss(self, state, output, training: bool) -> torch.Tensor:
        """The global mean loss of a batch with labels; the output has it where the loss is formed in tiles."""
        return output["loss"] if "loss" in output else state.loss(output["logits"], training)

    def refuse_other_losses(self, model: nn.Module, feature: str) -> None:
        """Raises NotImplementedError for a model with a loss function in whose place the loss of the block's `feature`
        would stand, if it is not the same."""
        if not self.causal or not hasattr(model, "loss_function"):  # the others' classes call no exchangeable function
            return
        from transformers.loss.loss_utils import ForCausalLMLoss

        if model.loss_function is not ForCausalLMLoss:
            raise NotImplementedError(
                f"ds4sci.{feature} computes the cross entropy of transformers' ForCausalLMLoss, and "
                f"{type(model).__name__} has a loss function of its own: {model.loss_function!r}"
            )

    def prepare(self, model: nn.Module, state) -> None:
        """Points a model whose sequences are split at `state`. Raises NotImplementedError for a variant that cannot
        be split."""
        self.attach(model, state)

    def attach(self, model: nn.Module, state) -> None:
        """Points the model's attention at `state`. Raises NotImplementedError for a variant whose attention differs
        from that of `state`."""
        register_attention()
        state.handles += [
            *(replace_attribute(module, "ds4sci_sequence", state) for module in self.attention_modules(model)),
            replace_attribute(model.config, "_attn_implementation", ATTENTION_NAME),
        ]


def trains(model: nn.Module) -> bool:
    """Whether the forward pass in work is one to learn from: all ranks make as many of those."""
    return model.training and torch.is_grad_enabled()


class ShardedOutput:
    """Stands where the logits of a batch with labels would be, and refuses their use."""

    MESSAGE = (
        "with labels in the batch the outputs stay split over the GPUs and only the loss is returned; leave labels "
        "out of the batch to get whole logits, and compute the loss from those"
    )

    def __getattr__(self, name):
        if name.startswith("__"):  # copying and introspection
            raise AttributeError(name)
        raise NotImplementedError(self.MESSAGE)

    def __getitem__(self, index):
        raise NotImplementedError(self.MESSAGE)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(cls.MESSAGE)


def _without_cache(model, arguments):
    """No key/value cache: recomputation would add to it, and it holds the keys of all layers."""
    caches = "use_cache" in inspect.signature(model.forward).parameters
    return {**arguments, "use_cache": False} if caches else arguments


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

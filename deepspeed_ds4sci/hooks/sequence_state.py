# SPDX-License-Identifier: Apache-2.0
"""The state that ties a model's attention layers to its inputs and outputs, while sequences are split or while the
attention of a model is not its own."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from deepspeed_ds4sci.hooks.families import family_of
from deepspeed_ds4sci.sequence.attention import SequenceParallelAttention
from deepspeed_ds4sci.sequence.blocks import accumulation_dtype
from deepspeed_ds4sci.sequence.groups import SequenceGroups
from deepspeed_ds4sci.sequence.inputs import InputSharder, ShardedBatch, batch_device
from deepspeed_ds4sci.sequence.local_attention import unsupported_reason
from deepspeed_ds4sci.sequence.loss import gather_sequence, global_mean, sharded_cross_entropy
from deepspeed_ds4sci.sequence.rotary import RotaryEmbedding, apply_rotary
from deepspeed_ds4sci.sequence.scores import ScoreRules, window_limits


class RankRandom:
    """Random numbers inside the model that differ between the ranks of a sequence group: each holds other tokens, so
    dropout must not repeat itself from rank to rank. Outside of the model the script's generator goes on as it would.

    Checkpointed layers save the generator's state inside, so recomputation draws the same numbers again.
    """

    def __init__(self, sp_rank: int):
        self.sp_rank = sp_rank
        self.state = None  # of this rank's own generator, while outside of the model
        self._outer = None

    def enter(self) -> None:
        self._outer = generator_state()
        if self.state is None:
            _seed(torch.initial_seed() + 7919 * (self.sp_rank + 1))
        else:
            set_generator_state(self.state)

    def leave(self) -> None:
        if self._outer is not None:
            self.state = generator_state()
            set_generator_state(self._outer)
            self._outer = None


def generator_state():
    """(the CPU generator's state, the current device's or None)."""
    from deepspeed.accelerator import get_accelerator

    on_device = None if get_accelerator().device_name() == "cpu" else get_accelerator().get_rng_state()
    return torch.get_rng_state(), on_device


def set_generator_state(state):
    """Restores what `generator_state` returned."""
    from deepspeed.accelerator import get_accelerator

    torch.set_rng_state(state[0])
    if state[1] is not None:
        get_accelerator().set_rng_state(state[1])


def _seed(seed):
    from deepspeed.accelerator import get_accelerator

    torch.default_generator.manual_seed(seed)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().manual_seed(seed)


@dataclass
class SequenceState:
    """One per model. `batch` is what the last forward pass works on; recomputation in its backward pass reads it.

    groups is None where one rank has the whole sequence.
    """

    groups: SequenceGroups | None
    attention: SequenceParallelAttention
    sharder: InputSharder
    handles: list[Any]
    """See `HookContext`."""
    window: int = 0
    batch: ShardedBatch | None = None
    random: RankRandom | None = None
    masks: Any = None
    """`hooks.attention_mask.MaskBuilder`, where masks are built for each batch."""
    slopes: torch.Tensor | None = None
    """[H] fp32: attention adds ALiBi's biases to the scores of a model that has none."""
    rotary: RotaryEmbedding | None = None
    """Attention rotates queries and keys of a model that does not."""
    checked: bool = False
    """The engine has compared the batch in work over the group."""
    _formed: Any = None  # (batch, its cosines and sines)

    def __deepcopy__(self, memo):
        """That of a copy of the model: in the same process groups, without the batch in work."""
        copied = memo[id(self)] = copy.copy(self)
        copied.batch = copied._formed = None
        copied.masks = None if self.masks is None else replace(self.masks, _latest=None)
        copied.handles, copied.random, copied.rotary = copy.deepcopy((self.handles, self.random, self.rotary), memo)
        return copied

    @property
    def divisor(self) -> int:
        """See `sequence.loss`."""
        return self.groups.dp_size * self.groups.sp_size

    def attend(self, q, k, v, *, dropout_p: float, scale: float | None) -> torch.Tensor:
        """Attention under the batch's masks. q: [B, L, H, D]; k, v: [B, L, G, D] -> [B, L, H, D]."""
        batch = self.batch
        if torch.is_autocast_enabled(q.device.type):
            # transformers rotates by fp32 angles; SDPA would cast, and so does this.
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        if self.rotary is not None:
            q, k = (apply_rotary(x, *self._angles(accumulation_dtype(q))) for x in (q, k))
        if self.slopes is not None and self.slopes.device != q.device:
            self.slopes = self.slopes.to(q.device)  # once, for all layers and steps
        masks = dict(
            # A script's own 4-D mask says everything about who sees whom, as in transformers.
            causal=self.sharder.causal and batch.mask is None,
            mask=None if batch.built else batch.attention_mask(),
            document_ids=batch.document_ids,
            window=self.window or None,
        )
        return self.attention(
            q, k, v, alibi_slopes=self.slopes, dropout_p=dropout_p, scale=scale, **{**masks, **self.built_mask()}
        )

    def with_masks(self, arguments: dict, take_in):
        """take_in(), which makes `batch` of a batch's arguments; then the batch gets its mask, where one is built."""
        if self.masks is None:
            return take_in()
        device = batch_device(arguments)
        custom = self.masks.take(arguments)
        taken = take_in()
        self.batch = self.masks.build(self.batch, custom, device)
        return taken

    def built_mask(self) -> dict:
        """The arguments of attention that a mask built for the batch replaces; none where there is no such mask."""
        if self.batch is None or not self.batch.built:
            return {}
        # The mask says it all; tiles that these empty need not be computed to find that out.
        limits = self.batch.limits if self.attention.skips_tiles else {}
        return {**dict(causal=False, window=None, document_ids=None), **limits, "mask": self.batch.mask}

    def refuse_unsupported(self) -> None:
        """Raises NotImplementedError if the named implementation of attention lacks what the hooks ask of it."""
        window = None if self.masks is not None else self.window or None
        left, right = window_limits(self.sharder.causal and self.masks is None, window)
        mask = None if self.masks is None else torch.ones(1, 1, 1, 1, dtype=torch.bool)
        rules = ScoreRules(1.0, left, right, slopes=self.slopes, mask=mask)
        reason = unsupported_reason(self.attention.implementation, rules)
        if reason is not None:
            raise NotImplementedError(f"ds4sci.attention.implementation: {reason}")

    def _angles(self, dtype):
        """Cosines and sines of the batch's positions, formed once for all layers."""
        if self._formed is None or self._formed[0] is not self.batch:
            self._formed = self.batch, self.rotary(self.batch.positions, dtype)
        return self._formed[1]

    def mean_loss(self, loss_sum: torch.Tensor, count: torch.Tensor, training: bool) -> torch.Tensor:
        """As `loss`, from this rank's sum and number of valid tokens."""
        group = self.groups.world_group if training else self.groups.sp_group
        return global_mean(loss_sum, count, group, self.divisor)

    def loss(self, logits: torch.Tensor, training: bool) -> torch.Tensor:
        """Training: the mean over the valid tokens of all ranks. Else over the sequence group's alone: evaluation
        loaders of data-parallel ranks may have different lengths."""
        group = self.groups.world_group if training else self.groups.sp_group
        return sharded_cross_entropy(logits, self.batch.labels, group, self.divisor)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [B, S, ...] without padding, for a script that goes on with whole outputs."""
        groups = self.groups
        return gather_sequence(tensor, self.batch.layout, groups.sp_group, groups.sp_size)[:, : self.batch.seq_len]


def new_state(model, context, groups: SequenceGroups | None) -> SequenceState:
    """The state of a model's attention as the config has it.

    Args:
        groups: of split sequences; None: this rank has whole sequences.

    Raises:
        NotImplementedError: see `refuse_other_recomputation`.
    """
    refuse_other_recomputation(model)
    parallel, attention = context.config.sequence_parallel, context.config.attention
    mode = "ulysses" if groups is None else parallel.layout_mode()
    implementation = "auto" if attention.implementation == "fastest" else attention.implementation
    group = None if groups is None else groups.sp_group
    return SequenceState(
        groups=groups,
        attention=SequenceParallelAttention(group, mode, implementation=implementation),
        sharder=InputSharder(
            size=1 if groups is None else groups.sp_size,
            mode=mode,
            rank=0 if groups is None else groups.sp_rank,
            padding=parallel.padding,
            causal=family_of(model).is_causal(model),
            pad_token_id=getattr(getattr(model, "config", None), "pad_token_id", None) or 0,
        ),
        handles=context.handles,
        window=attention.sliding_window,
    )


def refuse_other_recomputation(model) -> None:
    """Raises NotImplementedError for a model whose layers transformers or timm recomputes.

    Another forward pass may come before the backward pass, and the recomputed layers would attend under its batch.
    """
    switches = ("gradient_checkpointing", "grad_checkpointing")  # transformers', timm's
    if any(vars(module).get(switch) for module in model.modules() for switch in switches):
        raise NotImplementedError(
            f"the recomputation that {type(model).__name__} has of its own (gradient_checkpointing_enable, "
            "set_grad_checkpointing) does not go with the attention of the ds4sci block: layers would be recomputed "
            "with the batch of a later forward pass; disable it and set ds4sci.activation_checkpointing in the config"
        )

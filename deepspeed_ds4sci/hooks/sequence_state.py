# SPDX-License-Identifier: Apache-2.0
"""The state that ties a model's attention layers, its inputs and its outputs together while sequences are split."""

from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeed_ds4sci.sequence.attention import SequenceParallelAttention
from deepspeed_ds4sci.sequence.groups import SequenceGroups
from deepspeed_ds4sci.sequence.inputs import InputSharder, ShardedBatch
from deepspeed_ds4sci.sequence.loss import gather_sequence, global_mean, gradient_divisor, sharded_cross_entropy


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
    """One per model. `batch` is what the last forward pass works on; recomputation in its backward pass reads it."""

    groups: SequenceGroups
    attention: SequenceParallelAttention
    sharder: InputSharder
    zero_stage: int
    window: int = 0
    batch: ShardedBatch | None = None
    handles: list[Any] = field(default_factory=list)
    random: RankRandom | None = None
    checked: bool = False
    """The engine has compared the batch in work over the group."""

    @property
    def divisor(self) -> int:
        """See `sequence.loss`."""
        return gradient_divisor(self.zero_stage, self.groups.dp_size, self.groups.dp_size * self.groups.sp_size)

    def attend(self, q, k, v, *, dropout_p: float, scale: float | None) -> torch.Tensor:
        """Attention under the batch's masks. q: [B, L, H, D]; k, v: [B, L, G, D] -> [B, L, H, D]."""
        batch = self.batch
        return self.attention(
            q,
            k,
            v,
            # A script's own 4-D mask says everything about who sees whom, as in transformers.
            causal=self.sharder.causal and batch.mask is None,
            mask=batch.attention_mask(),
            document_ids=batch.document_ids,
            window=self.window or None,
            dropout_p=dropout_p,
            scale=scale,
        )

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
        factor = self.divisor / self.groups.dp_size
        return gather_sequence(tensor, self.batch.layout, self.groups.sp_group, factor)[:, : self.batch.seq_len]

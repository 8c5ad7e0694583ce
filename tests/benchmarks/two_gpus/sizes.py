# SPDX-License-Identifier: Apache-2.0
"""Sizes of the runs: FULL for 80 GB GPUs, TINY to rehearse the same steps on CPU ranks."""

from dataclasses import dataclass, replace

from deepspeed_ds4sci.models import GenSLMConfig

_NO_DROPOUT = {"embedding_dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0}


@dataclass(frozen=True)
class Sizes:
    """Lengths are in tokens. Every model is a `GenSLM`; those but the masks' have learned positions."""

    curves: GenSLMConfig
    curve_steps: int
    table: GenSLMConfig  # max_positions: rows of the table that is weighed
    longest: GenSLMConfig  # max_positions: no longer sequence is tried
    longest_start: int
    longest_multiple: int
    masks: GenSLMConfig
    mask_lengths: tuple[int, ...]
    mask_threshold: int
    cpu_headroom_bytes: int  # of a CPU rank, in place of a device's memory

    @property
    def curve_tokens(self) -> int:
        return self.curves.max_positions


_25M = GenSLMConfig.named("gpt2-25M", max_positions=2048, **_NO_DROPOUT)

FULL = Sizes(
    curves=_25M,
    curve_steps=100,
    table=replace(_25M, num_layers=1, max_positions=2**17),
    longest=replace(_25M, hidden_size=2048, num_layers=16, num_heads=16, intermediate_size=8192, max_positions=2**18),
    longest_start=16384,
    longest_multiple=512,
    masks=replace(_25M, num_layers=4, position_embedding="rotary", rotary_fraction=1.0),
    mask_lengths=(4096, 8192, 16384, 24576, 32768, 49152),
    mask_threshold=16384,
    cpu_headroom_bytes=0,
)

_TINY = replace(_25M, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_positions=64)

TINY = Sizes(
    curves=_TINY,
    curve_steps=5,
    table=replace(_TINY, max_positions=4096),
    longest=replace(_TINY, vocab_size=16384, max_positions=2**14),
    longest_start=128,
    longest_multiple=16,
    masks=replace(_TINY, position_embedding="rotary", rotary_fraction=1.0),
    mask_lengths=(64, 128, 256),
    mask_threshold=128,
    cpu_headroom_bytes=300 * 2**20,
)

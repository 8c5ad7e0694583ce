# SPDX-License-Identifier: Apache-2.0
"""The sizes that the example trains: the published ones, and a tiny one for CPUs."""

from dataclasses import replace

from deepspeed_ds4sci.models import NAMED_CONFIGS, GenSLMConfig

TINY = "tiny"
SIZES = (TINY, *NAMED_CONFIGS)

_TINY = GenSLMConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    intermediate_size=256,
    max_positions=256,
    position_embedding="learned",
    parallel_residual=False,
    activation="gelu_tanh",
    embedding_dropout=0.3,
    hidden_dropout=0.3,
)


def model_config(
    size: str, context: int, vocab_size: int, position_embedding: str | None = None, dropout: float | None = None
) -> GenSLMConfig:
    """The configuration of a size for windows of `context` tokens; None: as the size has it."""
    config = _TINY if size == TINY else GenSLMConfig.named(size)
    changes = dict(max_positions=max(context, config.max_positions if size != TINY else 0), vocab_size=vocab_size)
    if position_embedding is not None:
        changes["position_embedding"] = position_embedding
    if dropout is not None:
        changes |= dict(embedding_dropout=dropout, hidden_dropout=dropout)
    return replace(config, **changes)

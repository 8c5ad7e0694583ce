# SPDX-License-Identifier: Apache-2.0
"""Configuration of GenSLM-style decoders, and the published sizes.

Source of the sizes: Zvyagin et al. 2023 (GenSLMs) and the released model files. The vocabulary is 64 codons and five
special tokens: [UNK] [CLS] [SEP] [PAD] [MASK] = 0..4.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal

from deepspeed_ds4sci.sequence.rotary import RotaryScaling

CODON_VOCABULARY = 69
PAD_TOKEN = 3


@dataclass(frozen=True)
class GenSLMConfig:
    """A decoder. The defaults are those of the GPT-NeoX family.

    Raises:
        ValueError: sizes that do not fit each other, or values out of range; the message names the field.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    """Trained length in tokens. A learned table has so many rows; the other embeddings accept more."""
    vocab_size: int = CODON_VOCABULARY
    num_kv_heads: int | None = None
    """Key/value heads; None: as many as `num_heads`."""
    position_embedding: Literal["rotary", "learned", "alibi"] = "rotary"
    rotary_fraction: float = 0.25
    """Share of the head dim that is rotated, rounded down to an even number of channels."""
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    parallel_residual: bool = True
    """Attention and MLP read the same input (GPT-NeoX) in place of one after the other (GPT-2)."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    tie_embeddings: bool = False
    causal: bool = True
    """False: an encoder; labels are then not shifted."""
    window: int | None = None
    """Sliding attention window in tokens, the query included; None: the whole sequence."""
    embedding_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads = {self.num_heads}, got {self.hidden_size}")
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads = {self.key_value_heads}, got {self.num_heads}"
            )
        if self.position_embedding not in ("rotary", "learned", "alibi"):
            raise ValueError(
                f'position_embedding must be "rotary", "learned" or "alibi", got {self.position_embedding!r}'
            )
        if self.activation not in ("gelu", "gelu_tanh"):
            raise ValueError(f'activation must be "gelu" or "gelu_tanh", got {self.activation!r}')
        if self.position_embedding == "rotary" and not (0 < self.rotary_fraction <= 1 and self.rotary_dim >= 2):
            raise ValueError(
                f"rotary_fraction must be in (0, 1] and leave at least 2 of {self.head_dim} channels, "
                f"got {self.rotary_fraction}"
            )
        for name in ("embedding_dropout", "hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Rotated channels of each head."""
        return int(self.head_dim * self.rotary_fraction) // 2 * 2

    @classmethod
    def named(cls, name: str, **overrides) -> "GenSLMConfig":
        """A published size, such as "gpt-neox-25M", with fields changed by keyword.

        Raises:
            ValueError: an unknown name or field.
        """
        if name not in NAMED_CONFIGS:
            raise ValueError(f"name must be one of {', '.join(NAMED_CONFIGS)}, got {name!r}")
        unknown = sorted(set(overrides) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"GenSLMConfig has no field {', '.join(unknown)}")
        return replace(NAMED_CONFIGS[name], **overrides)


def _gpt_neox(hidden_size, num_layers, num_heads, intermediate_size, max_positions=2048):
    return GenSLMConfig(hidden_size, num_layers, num_heads, intermediate_size, max_positions)


def _gpt2(hidden_size, num_layers, num_heads):
    return GenSLMConfig(
        hidden_size,
        num_layers,
        num_heads,
        4 * hidden_size,
        max_positions=1024,
        position_embedding="learned",
        parallel_residual=False,
        activation="gelu_tanh",
        tie_embeddings=True,
        embedding_dropout=0.1,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )


NAMED_CONFIGS = {
    "gpt-neox-25M": _gpt_neox(512, 8, 8, 2048),
    "gpt-neox-25M-10k": _gpt_neox(512, 8, 8, 2048, max_positions=10240),
    "gpt-neox-250M": _gpt_neox(1840, 12, 16, 2048),
    "gpt-neox-250M-10k": _gpt_neox(1840, 12, 16, 2048, max_positions=10240),
    "gpt-neox-2.5B": _gpt_neox(3840, 28, 32, 4096),
    "gpt-neox-7.9B": _gpt_neox(5120, 50, 64, 5120),
    "gpt-neox-15B": _gpt_neox(7040, 48, 64, 8192),
    # Published with hidden size 8196, which 64 heads do not divide.
    "gpt-neox-25B": _gpt_neox(8192, 64, 64, 8000),
    # Not published: chosen here in the proportions of the family, for the 33B runs of DeepSpeed4Science.
    "gpt-neox-33B": _gpt_neox(9216, 64, 72, 9216),
    "gpt2-25M": _gpt2(512, 8, 8),
    "gpt2-256M": _gpt2(1152, 16, 16),
    "gpt2-2.5B": _gpt2(2624, 30, 32),
    "gpt2-25B": _gpt2(5760, 64, 64),
}

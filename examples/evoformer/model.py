# SPDX-License-Identifier: Apache-2.0
"""A small Evoformer that predicts hidden residues of an alignment."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed_ds4sci.data.alphabet import NUM_AMINO_ACIDS, VOCABULARY_SIZE
from deepspeed_ds4sci.data.masked_msa import IGNORE
from deepspeed_ds4sci.nn import EvoformerStack


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model; `EvoformerBlock` explains the names."""

    num_blocks: int = 2
    c_m: int = 64
    c_z: int = 16
    num_heads_msa: int = 4
    num_heads_pair: int = 2
    transition_n: int = 2
    msa_dropout: float = 0.1
    pair_dropout: float = 0.1
    checkpoint_blocks: bool = False
    implementation: str | None = None

    max_distance: int = 32
    """Residues; pairs further apart along the sequence share one embedding. AlphaFold clips at 32 too."""


class MaskedMSAModel(nn.Module):
    """Tokens -> logits over the 20 amino acids at every position of every row.

    The model knows nothing but the alignment it is shown: a row enters as its tokens, a pair as its distance along the
    sequence. It is told neither the number of a column nor any profile, so what it predicts comes from the other rows.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.max_distance = config.max_distance
        self.embed_token = nn.Embedding(VOCABULARY_SIZE, config.c_m)
        self.embed_distance = nn.Embedding(2 * config.max_distance + 1, config.c_z)
        for embedding in (self.embed_token, self.embed_distance):
            nn.init.normal_(embedding.weight, std=0.5)
        self.evoformer = EvoformerStack(
            config.num_blocks,
            config.c_m,
            config.c_z,
            c_s=None,
            c_hidden_msa_att=config.c_m // config.num_heads_msa,
            c_hidden_opm=max(1, config.c_z // 2),
            c_hidden_mul=config.c_z,
            c_hidden_pair_att=config.c_z // config.num_heads_pair,
            num_heads_msa=config.num_heads_msa,
            num_heads_pair=config.num_heads_pair,
            transition_n=config.transition_n,
            msa_dropout=config.msa_dropout,
            pair_dropout=config.pair_dropout,
            checkpoint_blocks=config.checkpoint_blocks,
            implementation=config.implementation,
        )
        self.layer_norm = nn.LayerNorm(config.c_m)
        self.head = nn.Linear(config.c_m, NUM_AMINO_ACIDS)

    def forward(self, shown: Tensor, columns: Tensor) -> Tensor:
        """shown int64 [batch, n_seq, n_res], columns int64 [batch, n_res] -> logits [batch, n_seq, n_res, 20]."""
        distance = columns[:, :, None] - columns[:, None, :]
        limit = self.max_distance
        z = self.embed_distance(distance.clamp(-limit, limit) + limit)
        m, _, _ = self.evoformer(self.embed_token(shown), z)
        return self.head(self.layer_norm(m))


def masked_loss(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(mean cross entropy in nats, accuracy) over the positions to predict, in fp32; target as in the data sets."""
    hidden = target != IGNORE
    logits, target = logits[hidden].float(), target[hidden]
    accuracy = (logits.argmax(dim=-1) == target).float().mean()
    return F.cross_entropy(logits, target), accuracy.detach()

# SPDX-License-Identifier: Apache-2.0
"""One Evoformer block and a stack of them."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepspeed_ds4sci.nn.attention import (
    MSAColumnAttention,
    MSARowAttentionWithPairBias,
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
)
from deepspeed_ds4sci.nn.primitives import Linear, SharedDropout
from deepspeed_ds4sci.nn.updates import (
    OuterProductMean,
    Transition,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)


class PairStack(nn.Module):
    """The updates of the pair representation in one block: Supplementary Algorithm 6, lines 6 to 10."""

    def __init__(
        self,
        c_z: int,
        *,
        c_hidden_mul: int,
        c_hidden_pair_att: int,
        num_heads_pair: int,
        transition_n: int,
        pair_dropout: float,
        implementation: str | None,
    ):
        super().__init__()
        self.tri_mul_out = TriangleMultiplicationOutgoing(c_z, c_hidden_mul)
        self.tri_mul_in = TriangleMultiplicationIncoming(c_z, c_hidden_mul)
        self.tri_att_start = TriangleAttentionStartingNode(
            c_z, c_hidden_pair_att, num_heads_pair, implementation=implementation
        )
        self.tri_att_end = TriangleAttentionEndingNode(
            c_z, c_hidden_pair_att, num_heads_pair, implementation=implementation
        )
        self.pair_transition = Transition(c_z, transition_n)
        self.dropout_row = SharedDropout(pair_dropout, shared_dim=-3)
        self.dropout_column = SharedDropout(pair_dropout, shared_dim=-2)

    def forward(self, z: Tensor, pair_mask: Tensor | None = None) -> Tensor:
        """z [*, n_res, n_res, c_z], pair_mask [*, n_res, n_res], keep = 1 -> updated z."""
        z = z + self.dropout_row(self.tri_mul_out(z, pair_mask))
        z = z + self.dropout_row(self.tri_mul_in(z, pair_mask))
        z = z + self.dropout_row(self.tri_att_start(z, pair_mask))
        z = z + self.dropout_column(self.tri_att_end(z, pair_mask))
        return z + self.pair_transition(z, pair_mask)


class EvoformerBlock(nn.Module):
    """One Evoformer block. The defaults are AlphaFold's.

    Args:
        c_m, c_z: channels of the alignment and pair representations.
        c_hidden_msa_att, num_heads_msa: channels per head and heads of row-wise and column-wise attention.
        c_hidden_opm: channels of the outer product mean.
        c_hidden_mul: channels of the triangle multiplications.
        c_hidden_pair_att, num_heads_pair: channels per head and heads of the triangle attentions.
        transition_n: width of the transitions, in multiples of c_m and c_z.
        msa_dropout, pair_dropout: probabilities; a mask is shared by all rows (ending-node attention: all columns).
        opm_first: outer product mean before the alignment is updated, as in AlphaFold-Multimer.
        implementation: of `evoformer_attention`; None picks the fastest supported.

    Source: Jumper et al. 2021, Supplementary Algorithm 6.
    """

    def __init__(
        self,
        c_m: int = 256,
        c_z: int = 128,
        *,
        c_hidden_msa_att: int = 32,
        c_hidden_opm: int = 32,
        c_hidden_mul: int = 128,
        c_hidden_pair_att: int = 32,
        num_heads_msa: int = 8,
        num_heads_pair: int = 4,
        transition_n: int = 4,
        msa_dropout: float = 0.15,
        pair_dropout: float = 0.25,
        opm_first: bool = False,
        implementation: str | None = None,
    ):
        super().__init__()
        self.opm_first = opm_first
        self.msa_att_row = MSARowAttentionWithPairBias(
            c_m, c_z, c_hidden_msa_att, num_heads_msa, implementation=implementation
        )
        self.msa_att_col = MSAColumnAttention(c_m, c_hidden_msa_att, num_heads_msa, implementation=implementation)
        self.msa_dropout = SharedDropout(msa_dropout, shared_dim=-3)
        self.msa_transition = Transition(c_m, transition_n)
        self.outer_product_mean = OuterProductMean(c_m, c_z, c_hidden_opm)
        self.pair_stack = PairStack(
            c_z,
            c_hidden_mul=c_hidden_mul,
            c_hidden_pair_att=c_hidden_pair_att,
            num_heads_pair=num_heads_pair,
            transition_n=transition_n,
            pair_dropout=pair_dropout,
            implementation=implementation,
        )

    def forward(
        self, m: Tensor, z: Tensor, msa_mask: Tensor | None = None, pair_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Updates both representations.

        Args:
            m: [*, n_seq, n_res, c_m].
            z: [*, n_res, n_res, c_z].
            msa_mask: [*, n_seq, n_res], bool or 0/1, keep = 1; None keeps all.
            pair_mask: [*, n_res, n_res], the same.

        Returns:
            (m, z). What a mask drops never influences what it keeps.
        """
        if self.opm_first:
            z = z + self.outer_product_mean(m, msa_mask)
        m = m + self.msa_dropout(self.msa_att_row(m, z, msa_mask))
        m = m + self.msa_att_col(m, msa_mask)
        m = m + self.msa_transition(m, msa_mask)
        if not self.opm_first:
            z = z + self.outer_product_mean(m, msa_mask)
        return m, self.pair_stack(z, pair_mask)


class EvoformerStack(nn.Module):
    """Evoformer blocks one after the other, and the single representation.

    Args:
        num_blocks: AlphaFold has 48.
        c_m, c_z: channels of the alignment and pair representations.
        c_s: channels of the single representation; None leaves it out.
        checkpoint_blocks: recompute each block in the backward pass instead of keeping what is inside it.
        block: further arguments of `EvoformerBlock`.

    Source: Jumper et al. 2021, Supplementary Algorithm 6.
    """

    def __init__(
        self,
        num_blocks: int = 48,
        c_m: int = 256,
        c_z: int = 128,
        *,
        c_s: int | None = 384,
        checkpoint_blocks: bool = False,
        **block,
    ):
        super().__init__()
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.checkpoint_blocks = checkpoint_blocks
        self.blocks = nn.ModuleList(EvoformerBlock(c_m, c_z, **block) for _ in range(num_blocks))
        self.linear = None if c_s is None else Linear(c_m, c_s)

    def forward(
        self, m: Tensor, z: Tensor, msa_mask: Tensor | None = None, pair_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Arguments as for `EvoformerBlock`.

        Returns:
            (m, z, s): s [*, n_res, c_s] from the first sequence, None when the stack has no c_s.
        """
        recompute = self.checkpoint_blocks and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                m, z = checkpoint(block, m, z, msa_mask, pair_mask, use_reentrant=False)
            else:
                m, z = block(m, z, msa_mask, pair_mask)
        return m, z, None if self.linear is None else self.linear(m[..., 0, :, :])

# SPDX-License-Identifier: Apache-2.0
"""The four attention modules of the Evoformer, on the fused op.

Axes: n_seq sequences of an alignment, n_res residues, c_m / c_z channels, H heads, D channels per head; leading axes
[*] are batch. Masks are bool or 0/1, keep = 1: a dropped key influences nothing, a query without any key attends to 0.
Parameter names are OpenFold's.
"""

import math

import torch
from torch import Tensor, nn

from deepspeed_ds4sci.nn.primitives import Linear, check_features, check_mask, check_pair, num_inference_slices
from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention


class GatedAttention(nn.Module):
    """Multi-head self-attention with a sigmoid gate on the output, along either axis of a table of features.

    o = linear_o(evoformer_attention(linear_q(x), linear_k(x), linear_v(x), biases, gate=linear_g(x)))

    Args:
        c_in: channels of the input and the output.
        c_hidden: channels per head, D, 1 to 128.
        num_heads: H.
        implementation: passed to `evoformer_attention`; None picks the fastest supported.

    Source: Jumper et al. 2021, Supplementary Algorithms 7, 8, 13, 14, the part they share.
    """

    def __init__(self, c_in: int, c_hidden: int, num_heads: int, *, implementation: str | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.implementation = implementation
        width = c_hidden * num_heads
        self.linear_q = Linear(c_in, width, bias=False, init="glorot")
        self.linear_k = Linear(c_in, width, bias=False, init="glorot")
        self.linear_v = Linear(c_in, width, bias=False, init="glorot")
        self.linear_g = Linear(c_in, width, init="gating")
        self.linear_o = Linear(width, c_in, init="final")

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, pair_bias: Tensor | None = None, attend_rows: bool = False
    ) -> Tensor:
        """Attends along axis -2 of x, or along axis -3 with attend_rows.

        Args:
            x: [*, R, C, c_in], already layer-normalised.
            mask: [*, R, C], keep = 1.
            pair_bias: [*, A, A, H] with A the attended length, added to the logits of every row that attends.
            attend_rows: attend along R instead of C. The transposition is a view, never a copy.

        Returns:
            [*, R, C, c_in].
        """
        lead = x.shape[:-3]
        x = x.reshape(math.prod(lead), *x.shape[-3:])
        if mask is not None:
            mask = mask.reshape(x.shape[:-1]).bool()
        if pair_bias is not None:
            pair_bias = pair_bias.reshape(x.shape[0], *pair_bias.shape[-3:]).permute(0, 3, 1, 2).unsqueeze(1)
        # Rows do not attend to each other, so that they can come in slices. Counted: q, k, v, gate, output.
        row_axis = 2 if attend_rows else 1
        slices = num_inference_slices(5 * x.shape[:-1].numel() * self.linear_q.out_features, x.shape[row_axis])
        parts = x.tensor_split(slices, dim=row_axis)
        masks = [None] * slices if mask is None else mask.tensor_split(slices, dim=row_axis)
        updates = [self._attend(*part, pair_bias, attend_rows) for part in zip(parts, masks, strict=True)]
        update = updates[0] if slices == 1 else torch.cat(updates, dim=row_axis)
        return update.reshape(*lead, *x.shape[1:])

    def _attend(self, x: Tensor, mask: Tensor | None, pair_bias: Tensor | None, attend_rows: bool) -> Tensor:
        """x [B, R, C, c_in], mask bool [B, R, C], pair_bias [B, 1, H, A, A] -> [B, R, C, c_in]."""
        q = self._heads(self.linear_q(x), attend_rows)
        k = self._heads(self.linear_k(x), attend_rows)
        v = self._heads(self.linear_v(x), attend_rows)
        if mask is not None:
            mask = (mask.transpose(-1, -2) if attend_rows else mask)[:, :, None, None, :]  # [B, N, 1, 1, L]
        gate = self._heads(self.linear_g(x), attend_rows)
        o = evoformer_attention(
            q, k, v, mask_bias=mask, pair_bias=pair_bias, gate=gate, implementation=self.implementation
        )  # [B, N, L, H, D]
        # Projected before it is transposed back: o is contiguous, so linear_o keeps the tensor that the op keeps, too.
        update = self.linear_o(o.flatten(-2))
        return update.transpose(1, 2) if attend_rows else update

    def _heads(self, x: Tensor, attend_rows: bool) -> Tensor:
        """[B, R, C, H * D] -> view [B, N, L, H, D]."""
        x = x.unflatten(-1, (self.num_heads, -1))
        return x.transpose(1, 2) if attend_rows else x


class MSAAttention(nn.Module):
    """Layer norm and gated attention on an alignment; base of the row-wise and part of the column-wise module."""

    def __init__(self, c_m: int, c_hidden: int, num_heads: int, *, implementation: str | None = None):
        super().__init__()
        self.c_m = c_m
        self.layer_norm_m = nn.LayerNorm(c_m)
        self.mha = GatedAttention(c_m, c_hidden, num_heads, implementation=implementation)

    def check(self, m: Tensor, mask: Tensor | None) -> None:
        """Raises ValueError unless m is [*, n_seq, n_res, c_m] and mask, if any, [*, n_seq, n_res]."""
        check_features("m", m, "[*, n_seq, n_res, c_m]", self.c_m)
        check_mask("mask", mask, m.shape[:-1])


class MSARowAttentionWithPairBias(MSAAttention):
    """Each sequence attends over its residues; the pair representation biases the logits, the same for all sequences.

    Source: Jumper et al. 2021, Supplementary Algorithm 7.
    """

    def __init__(self, c_m: int, c_z: int, c_hidden: int, num_heads: int, *, implementation: str | None = None):
        super().__init__(c_m, c_hidden, num_heads, implementation=implementation)
        self.c_z = c_z
        self.layer_norm_z = nn.LayerNorm(c_z)
        self.linear_z = Linear(c_z, num_heads, bias=False, init="normal")

    def forward(self, m: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update of m: m [*, n_seq, n_res, c_m], z [*, n_res, n_res, c_z], mask [*, n_seq, n_res], keep = 1."""
        self.check(m, mask)
        check_pair("z", z, self.c_z)
        if z.shape[:-3] != m.shape[:-3] or z.shape[-2] != m.shape[-2]:
            expected = [*m.shape[:-3], m.shape[-2], m.shape[-2], self.c_z]
            raise ValueError(f"z must be [*, n_res, n_res, c_z] = {expected} to fit m, got shape {list(z.shape)}")
        pair_bias = self.linear_z(self.layer_norm_z(z))  # [*, n_res, n_res, H]
        return self.mha(self.layer_norm_m(m), mask=mask, pair_bias=pair_bias)


class MSAColumnAttention(nn.Module):
    """Each residue position attends over the sequences of the alignment.

    Source: Jumper et al. 2021, Supplementary Algorithm 8.
    """

    def __init__(self, c_m: int, c_hidden: int, num_heads: int, *, implementation: str | None = None):
        super().__init__()
        self._msa_att = MSAAttention(c_m, c_hidden, num_heads, implementation=implementation)

    def forward(self, m: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update of m: m [*, n_seq, n_res, c_m], mask [*, n_seq, n_res], keep = 1."""
        self._msa_att.check(m, mask)
        return self._msa_att.mha(self._msa_att.layer_norm_m(m), mask=mask, attend_rows=True)


class TriangleAttention(nn.Module):
    """Attention between the edges that share a node; the third edge of each triangle biases the logits."""

    _attend_rows: bool

    def __init__(self, c_z: int, c_hidden: int, num_heads: int, *, implementation: str | None = None):
        super().__init__()
        self.c_z = c_z
        self.layer_norm = nn.LayerNorm(c_z)
        self.linear = Linear(c_z, num_heads, bias=False, init="normal")
        self.mha = GatedAttention(c_z, c_hidden, num_heads, implementation=implementation)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update of z: z [*, n_res, n_res, c_z], mask [*, n_res, n_res], keep = 1."""
        check_pair("z", z, self.c_z)
        check_mask("mask", mask, z.shape[:-1])
        z = self.layer_norm(z)
        pair_bias = self.linear(z)  # [*, n_res, n_res, H]
        if self._attend_rows:
            pair_bias = pair_bias.transpose(-3, -2)  # query i, key k: edge ki
        return self.mha(z, mask=mask, pair_bias=pair_bias, attend_rows=self._attend_rows)


class TriangleAttentionStartingNode(TriangleAttention):
    """Edge ij attends over the edges ik that start at the same node i; edge jk gives the bias.

    Source: Jumper et al. 2021, Supplementary Algorithm 13.
    """

    _attend_rows = False


class TriangleAttentionEndingNode(TriangleAttention):
    """Edge ij attends over the edges kj that end at the same node j; edge ki gives the bias.

    Equal to the starting-node module on the transposed pair representation, transposed back.

    Source: Jumper et al. 2021, Supplementary Algorithm 14.
    """

    _attend_rows = True

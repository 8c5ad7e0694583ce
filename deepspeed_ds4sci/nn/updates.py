# SPDX-License-Identifier: Apache-2.0
"""The Evoformer's updates without attention: outer product mean, triangle multiplication, transitions.

Plain PyTorch. Axes and masks as in `attention.py`; parameter names are OpenFold's.
"""

import torch
from torch import Tensor, nn

from deepspeed_ds4sci.nn.primitives import (
    Linear,
    apply_mask,
    check_features,
    check_mask,
    check_pair,
    num_inference_slices,
)


class OuterProductMean(nn.Module):
    """Mean over the sequences of the outer product of two projections: alignment to pair representation.

    z_ij = linear_out(sum_s a_si (x) b_sj) / (eps + number of sequences that have both i and j)

    Source: Jumper et al. 2021, Supplementary Algorithm 10. As in AlphaFold's code, the division comes after the
    projection and its bias, and eps = 1e-3.
    """

    def __init__(self, c_m: int, c_z: int, c_hidden: int, *, eps: float = 1e-3):
        super().__init__()
        self.c_m = c_m
        self.eps = eps
        self.layer_norm = nn.LayerNorm(c_m)
        self.linear_1 = Linear(c_m, c_hidden)
        self.linear_2 = Linear(c_m, c_hidden)
        self.linear_out = Linear(c_hidden**2, c_z, init="final")

    def forward(self, m: Tensor, mask: Tensor | None = None) -> Tensor:
        """m [*, n_seq, n_res, c_m], mask [*, n_seq, n_res], keep = 1 -> update of z, [*, n_res, n_res, c_z]."""
        check_features("m", m, "[*, n_seq, n_res, c_m]", self.c_m)
        check_mask("mask", mask, m.shape[:-1])
        m = self.layer_norm(m)
        a = apply_mask(self.linear_1(m), mask)  # [*, n_seq, n_res, c]
        b = apply_mask(self.linear_2(m), mask)
        count = float(m.shape[-3]) if mask is None else _pair_counts(mask, m.dtype).unsqueeze(-1)
        n_res = a.shape[-2]
        outer_elements = a.shape[:-3].numel() * n_res**2 * a.shape[-1] ** 2
        slices = num_inference_slices(outer_elements, n_res)
        updates = [self._project(part, b) for part in a.tensor_split(slices, dim=-2)]
        update = updates[0] if slices == 1 else torch.cat(updates, dim=-3)
        return (update / (self.eps + count)).to(update.dtype)

    def _project(self, a: Tensor, b: Tensor) -> Tensor:
        outer = torch.einsum("...sic,...sjd->...ijcd", a, b)
        return self.linear_out(outer.flatten(-2))


def _pair_counts(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """mask [*, n_seq, n_res] -> how many sequences keep both i and j, [*, n_res, n_res], fp32 or fp64.

    Never in 16 bits, autocast or not: bf16 cannot count beyond 256.
    """
    with torch.autocast(mask.device.type, enabled=False):
        keep = mask.to(torch.float64 if dtype == torch.float64 else torch.float32)
        return torch.einsum("...si,...sj->...ij", keep, keep)


class TriangleMultiplication(nn.Module):
    """Combines, for each edge ij, the two other edges of every triangle by a gated product."""

    _equation: str
    _i_dim: int
    """Axis of a, [*, n_res, n_res, c], that runs over i."""

    def __init__(self, c_z: int, c_hidden: int):
        super().__init__()
        self.c_z = c_z
        self.layer_norm_in = nn.LayerNorm(c_z)
        self.linear_a_p = Linear(c_z, c_hidden)
        self.linear_a_g = Linear(c_z, c_hidden, init="gating")
        self.linear_b_p = Linear(c_z, c_hidden)
        self.linear_b_g = Linear(c_z, c_hidden, init="gating")
        self.layer_norm_out = nn.LayerNorm(c_hidden)
        self.linear_z = Linear(c_hidden, c_z, init="final")
        self.linear_g = Linear(c_z, c_z, init="gating")

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update of z: z [*, n_res, n_res, c_z], mask [*, n_res, n_res], keep = 1."""
        check_pair("z", z, self.c_z)
        check_mask("mask", mask, z.shape[:-1])
        z = self.layer_norm_in(z)
        b = apply_mask(torch.sigmoid(self.linear_b_g(z)) * self.linear_b_p(z), mask)
        # Each slice makes some rows i of the update: from the rows i of the gate and the edges ik or ki of a.
        slices = num_inference_slices(4 * b.numel(), z.shape[-3])
        gates = z.tensor_split(slices, dim=-3)
        edges = z.tensor_split(slices, dim=self._i_dim)
        masks = [None] * slices if mask is None else mask.tensor_split(slices, dim=self._i_dim + 1)
        updates = [self._update(*part, b) for part in zip(gates, edges, masks, strict=True)]
        return updates[0] if slices == 1 else torch.cat(updates, dim=-3)

    def _update(self, z_gate: Tensor, z_edge: Tensor, mask: Tensor | None, b: Tensor) -> Tensor:
        a = apply_mask(torch.sigmoid(self.linear_a_g(z_edge)) * self.linear_a_p(z_edge), mask)
        product = torch.einsum(self._equation, a, b)
        return torch.sigmoid(self.linear_g(z_gate)) * self.linear_z(self.layer_norm_out(product))


class TriangleMultiplicationOutgoing(TriangleMultiplication):
    """Edge ij from the edges ik and jk. Source: Jumper et al. 2021, Supplementary Algorithm 11."""

    _equation = "...ikc,...jkc->...ijc"
    _i_dim = -3


class TriangleMultiplicationIncoming(TriangleMultiplication):
    """Edge ij from the edges ki and kj. Source: Jumper et al. 2021, Supplementary Algorithm 12."""

    _equation = "...kic,...kjc->...ijc"
    _i_dim = -2


class Transition(nn.Module):
    """Two-layer perceptron on every element. Source: Jumper et al. 2021, Supplementary Algorithms 9 and 15.

    AlphaFold's code does not mask here and OpenFold does by default; with a mask, dropped elements get no update.
    """

    def __init__(self, channels: int, n: int = 4):
        super().__init__()
        self.channels = channels
        self.layer_norm = nn.LayerNorm(channels)
        self.linear_1 = Linear(channels, n * channels, init="relu")
        self.linear_2 = Linear(n * channels, channels, init="final")

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Update of x: x [*, a, b, channels], mask [*, a, b], keep = 1."""
        check_features("x", x, "[*, a, b, channels]", self.channels)
        check_mask("mask", mask, x.shape[:-1])
        hidden_elements = x.shape[:-1].numel() * self.linear_1.out_features
        slices = num_inference_slices(hidden_elements, x.shape[-3])
        updates = [self._update(part) for part in x.tensor_split(slices, dim=-3)]
        return apply_mask(updates[0] if slices == 1 else torch.cat(updates, dim=-3), mask)

    def _update(self, x: Tensor) -> Tensor:
        return self.linear_2(torch.relu(self.linear_1(self.layer_norm(x))))

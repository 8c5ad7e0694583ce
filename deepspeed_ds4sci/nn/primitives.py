# SPDX-License-Identifier: Apache-2.0
"""Building blocks shared by the Evoformer modules: initialised linears, shared-mask dropout, argument checks."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Init = Literal["lecun", "relu", "glorot", "normal", "gating", "final"]

MAX_INFERENCE_ELEMENTS = 1 << 27
"""Elements of intermediates that a module holds at once when no gradient is recorded; more are made in slices."""

# Standard deviation of a unit normal cut off at two standard deviations.
_TRUNCATED_STD = 0.8796256610342398


class Linear(nn.Linear):
    """`nn.Linear` with the initialisers of Jumper et al. 2021, Supplementary 1.11.4. Biases start at 0 unless stated.

    init:
        "lecun": truncated normal, variance 1 / fan-in. The default.
        "relu": truncated normal, variance 2 / fan-in; in front of a ReLU.
        "glorot": uniform, fan average; queries, keys, values.
        "normal": normal, variance 1 / fan-in; projections that become an attention bias.
        "gating": weight 0, bias 1; in front of a sigmoid gate, which so starts open at 0.73.
        "final": weight 0; the last layer of a residual update, which so starts as the identity.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, init: Init = "lecun"):
        # Set first: nn.Linear calls reset_parameters, and initialising there keeps meta devices and zero.Init working.
        self.init = init
        super().__init__(in_features, out_features, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.bias is not None:
            self.bias.fill_(1.0 if self.init == "gating" else 0.0)
        if self.init in ("gating", "final"):
            self.weight.zero_()
        elif self.init == "glorot":
            nn.init.xavier_uniform_(self.weight)
        elif self.init == "normal":
            nn.init.normal_(self.weight, std=self.in_features**-0.5)
        elif self.init in ("lecun", "relu"):
            gain = 2.0 if self.init == "relu" else 1.0
            std = math.sqrt(gain / self.in_features) / _TRUNCATED_STD
            nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        else:
            raise ValueError(f"init must be one of lecun, relu, glorot, normal, gating, final, got {self.init!r}")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init={self.init}"


class SharedDropout(nn.Module):
    """Dropout whose mask is shared along one axis, so that whole rows or columns of channels drop together.

    shared_dim = -3 is DropoutRowwise, mask [*, 1, n_res, c]; shared_dim = -2 is DropoutColumnwise, mask [*, n, 1, c].
    Source: Jumper et al. 2021, Supplementary 1.11.6.
    """

    def __init__(self, p: float, shared_dim: int):
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p must be a dropout probability in [0, 1), got {p}")
        self.p = p
        self.shared_dim = shared_dim

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        shape = list(x.shape)
        shape[self.shared_dim] = 1
        return x * F.dropout(x.new_ones(shape), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, shared_dim={self.shared_dim}"


def check_features(name: str, x: Tensor, layout: str, channels: int) -> None:
    """Raises ValueError unless `x` is [*, a, b, channels]; `layout` is that shape in words, for the message."""
    if x.dim() < 3 or x.shape[-1] != channels:
        raise ValueError(f"{name} must be {layout} with {channels} channels, got shape {list(x.shape)}")


def check_pair(name: str, z: Tensor, channels: int) -> None:
    """Raises ValueError unless `z` is a pair representation [*, n_res, n_res, channels]."""
    check_features(name, z, "[*, n_res, n_res, c_z]", channels)
    if z.shape[-3] != z.shape[-2]:
        raise ValueError(f"{name} must be square, [*, n_res, n_res, c_z], got shape {list(z.shape)}")


def check_mask(name: str, mask: Tensor | None, expected: torch.Size) -> None:
    """Raises ValueError unless `mask` is None or has exactly the shape `expected`."""
    if mask is not None and mask.shape != expected:
        raise ValueError(f"{name} must be {list(expected)} (keep = 1), got shape {list(mask.shape)}")


def apply_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [*, c] where mask [*] keeps, 0 elsewhere; x itself without a mask."""
    return x if mask is None else x * mask.unsqueeze(-1).to(x.dtype)


def num_inference_slices(elements: int, rows: int) -> int:
    """How many slices of `rows` keep intermediates of `elements` elements near MAX_INFERENCE_ELEMENTS.

    1 while gradients are recorded: every slice would be kept for the backward pass, so slicing would save nothing.
    """
    return 1 if torch.is_grad_enabled() else max(1, min(rows, math.ceil(elements / MAX_INFERENCE_ELEMENTS)))

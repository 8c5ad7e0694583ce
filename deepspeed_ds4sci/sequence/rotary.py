# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, with scaling for sequences longer than those trained on.

Angles are formed in fp64 and cast once: in fp32, position * frequency loses about 0.06 rad beyond a million tokens.

Sources: Su et al. 2021 (rotary); Chen et al. 2023 (linear); bloc97 2023 (NTK); Peng et al. 2023 (YaRN).
Axes: B batch, L tokens, H heads, D head dim, R rotated part of it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class RotaryScaling:
    """How frequencies change so that `factor` times the trained length can be used.

    kind:
        "linear": positions divided by the factor.
        "ntk": a larger base, so that high frequencies stay and the lowest is divided by the factor.
        "yarn": frequencies with more than beta_fast turns over the trained length stay, those with less than beta_slow
            are divided by the factor, with a ramp between; and cos and sin are multiplied by 0.1 ln(factor) + 1.
    """

    kind: Literal["linear", "ntk", "yarn"]
    factor: float
    """Longest length over trained length; at least 1."""
    original_length: int | None = None
    """Trained length in tokens; "yarn" needs it."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self):
        if self.kind not in ("linear", "ntk", "yarn"):
            raise ValueError(f'kind must be "linear", "ntk" or "yarn", got {self.kind!r}')
        if not self.factor >= 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        if self.kind == "yarn" and (self.original_length is None or self.original_length < 1):
            raise ValueError(f"original_length must be given in tokens for yarn, got {self.original_length}")
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(f"beta_fast must be above beta_slow > 0, got {self.beta_fast} and {self.beta_slow}")


def rotary_frequencies(dim: int, base: float = 10000.0, scaling: RotaryScaling | None = None):
    """Angular frequencies in rad per token, and what cos and sin are multiplied with.

    Args:
        dim: R, even.

    Returns:
        ([R / 2] fp64 on the CPU, float).

    Raises:
        ValueError: R is odd or not positive.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"the rotated part of a head must be even and at least 2, got {dim}")
    if scaling is not None and scaling.kind == "ntk":
        base *= scaling.factor ** (dim / (dim - 2)) if dim > 2 else scaling.factor
    # The device is named: under `torch.device("meta")` there would be no numbers.
    frequencies = base ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    if scaling is None or scaling.kind == "ntk":
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0

    def pair_with_turns(turns):
        """Index (not whole) of the frequency that turns this often over the trained length."""
        return dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with_turns(scaling.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / scaling.factor * ramp, 0.1 * math.log(scaling.factor) + 1


class RotaryEmbedding(torch.nn.Module):
    """Cosines and sines for given global positions. Has no parameters, and no state to save.

    Args:
        dim: R, the rotated part of the head dim; even.
        base: angular frequencies are base ** (-2 i / R) rad per token.
        scaling: None or how to stretch.
    """

    def __init__(self, dim: int, base: float = 10000.0, scaling: RotaryScaling | None = None):
        super().__init__()
        self.dim, self.base, self.scaling = dim, base, scaling
        # Not a buffer: `module.half()` or a precision engine would cast it.
        self.frequencies, self.attention_factor = rotary_frequencies(dim, base, scaling)

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin for position_ids of any shape: [*shape, R / 2] in `dtype`, formed in fp64."""
        if self.frequencies.device != position_ids.device:
            self.frequencies = self.frequencies.to(position_ids.device)
        angles = position_ids[..., None].double() * self.frequencies
        return tuple((f(angles) * self.attention_factor).to(dtype) for f in (torch.cos, torch.sin))

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, scaling={self.scaling}"


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotates the first R of each head's D channels; the rest passes unchanged.

    Args:
        x: [B, L, H, D].
        cos, sin: [B|1, L, R / 2] from `RotaryEmbedding`; fp32 rotates in fp32 whatever the dtype of x.
        interleaved: channel i is paired with its neighbour (GPT-J) in place of channel i + R / 2 (GPT-NeoX, Llama).

    Returns:
        [B, L, H, D], dtype of x.
    """
    half = cos.shape[-1]
    rotated, passed = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos[..., None, :], sin[..., None, :]  # [B|1, L, 1, R / 2]
    a, b = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.split(half, -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    turned = turned.to(x.dtype)
    return torch.cat([turned, passed], -1) if passed.shape[-1] else turned

# SPDX-License-Identifier: Apache-2.0
"""Attention with linear biases: train short, evaluate long. Source: Press, Smith, Lewis 2022."""

import torch


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> torch.Tensor:
    """[heads] fp32: the slope of each head's bias, -slope * |query - key|.

    For a power of two, 2 ** (-8 * i / heads) for i = 1..heads; else the slopes of the next lower power of two, then
    every other one of the next higher, as in the paper's code.

    Raises:
        ValueError: no heads.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    lower = 2 ** (heads.bit_length() - 1)
    slopes = _geometric(lower) + _geometric(2 * lower)[0::2][: heads - lower]
    return torch.tensor(slopes, dtype=torch.float64).to(dtype=torch.float32, device=device)


def alibi_bias(slopes: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    """[H, Q, K] fp32: what is added to scaled scores. Explicit; the implementations here form it tile by tile.

    Args:
        slopes: [H]; query_positions: [Q]; key_positions: [K]: integers, global positions in tokens.
    """
    distance = (query_positions[:, None] - key_positions[None, :]).abs()
    return -slopes.float()[:, None, None] * distance


def _geometric(heads: int) -> list[float]:
    return [2.0 ** (-8.0 * i / heads) for i in range(1, heads + 1)]

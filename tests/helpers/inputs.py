# SPDX-License-Identifier: Apache-2.0
"""Random inputs for a shape, in every memory layout and with every kind of mask and pair bias that callers use."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .shapes import AttentionShape

Layout = Literal["contiguous", "ending_node", "packed_qkv", "unaligned", "strided_last", "heads_first"]
MaskKind = Literal["none", "additive", "fp32", "bool", "padded", "all_masked", "minus_inf", "shared", "expanded"]
GateKind = Literal["contiguous", "transposed", "unaligned", "open", "closed"]
PairKind = Literal[
    "none",
    "contiguous",
    "transposed",
    "last_heads",
    "fp32",
    "expanded",
    "per_row",
    "shared_samples",
    "one_head",
    "minus_inf",
]
LAYOUTS: tuple[str, ...] = Layout.__args__
MASK_KINDS: tuple[str, ...] = MaskKind.__args__
PAIR_KINDS: tuple[str, ...] = PairKind.__args__
GATE_KINDS: tuple[str, ...] = GateKind.__args__
LARGE_NEGATIVE = {torch.float16: -3e4}  # the usual -1e9 in every other dtype


def repeated_axes(x: Tensor) -> tuple[int, ...]:
    """Axes along which x is an expanded view: its elements are one number in memory there."""
    return tuple(axis for axis in range(x.dim()) if x.shape[axis] > 1 and x.stride(axis) == 0)


@dataclass
class AttentionInputs:
    """Arguments of the op and a gradient for its output; every float tensor but that one requires a gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask_bias: Tensor | None
    pair_bias: Tensor | None
    gate: Tensor | None
    do: Tensor

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.q, self.k, self.v, self.mask_bias, self.pair_bias, self.gate

    def named(self) -> dict[str, Tensor | None]:
        """The tensors by the op's names for them."""
        return dict(zip(("q", "k", "v", "mask_bias", "pair_bias", "gate"), self.tensors(), strict=True))

    def differentiable(self) -> dict[str, Tensor]:
        """name -> tensor, for those that require a gradient."""
        return {name: x for name, x in self.named().items() if x is not None and x.requires_grad}

    def to(self, dtype: torch.dtype) -> "AttentionInputs":
        """Fresh copies in another dtype, contiguous but for repeated axes; a boolean mask stays as it is."""

        def cast(x):
            if x is None or x.dtype == torch.bool:
                return x
            once = x.detach()
            for axis in repeated_axes(x):
                once = once.narrow(axis, 0, 1)
            return once.to(dtype).contiguous().expand(x.shape).requires_grad_(x.requires_grad)

        return AttentionInputs(*(cast(x) for x in self.tensors()), cast(self.do))


def _lay_out(x: Tensor, layout: Layout) -> Tensor:
    """The values of x [B, N, L, H, D] in other places in memory; the last axis stays unit stride unless said."""
    if layout == "contiguous":
        return x
    if layout == "ending_node":  # attention around the ending node: N and L change places
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "heads_first":  # [B, N, H, L, D], as most attention modules keep it
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "packed_qkv":  # one slice of a fused projection
        packed = x.new_full((*x.shape[:-2], 3, *x.shape[-2:]), float("nan"))
        packed[..., 1, :, :] = x
        return packed[..., 1, :, :]
    if layout == "unaligned":  # starts one element late, rows one element apart: never 16-byte aligned
        padded = x.new_full((*x.shape[:-1], x.shape[-1] + 1), float("nan"))
        padded[..., 1:] = x
        return padded[..., 1:]
    if layout == "strided_last":
        spread = x.new_full((*x.shape, 2), float("nan"))
        spread[..., 0] = x
        return spread[..., 0]
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def _mask(kind: MaskKind, shape: AttentionShape, dtype: torch.dtype, randn, rand) -> Tensor | None:
    sizes = (shape.batch, shape.rows, 1, 1, shape.k_len)
    large = LARGE_NEGATIVE.get(dtype, -1e9)
    if kind == "none":
        return None
    if kind == "additive":
        return randn(sizes).to(dtype)
    if kind == "fp32":
        return randn(sizes).float()
    if kind in ("bool", "minus_inf"):
        keep = rand(sizes) > 0.2
        keep[..., shape.k_len // 2] = True  # all rows keep a key; "all_masked" is for those that do not
        return keep if kind == "bool" else torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, float("-inf"))
    if kind == "padded":  # a prefix of another length in each row is real, the rest padding
        lengths = 1 + (rand(sizes[:2]) * shape.k_len).long().clamp(max=shape.k_len - 1)
        padding = torch.arange(shape.k_len, device=lengths.device) >= lengths[:, :, None, None, None]
        return torch.zeros_like(padding, dtype=dtype).masked_fill(padding, large)
    if kind == "all_masked":  # every second row has no key at all
        mask = torch.zeros_like(rand(sizes), dtype=dtype)
        mask[:, ::2] = float("-inf")
        return mask
    if kind == "shared":
        return randn((1, 1, 1, 1, shape.k_len)).to(dtype)
    if kind == "expanded":
        return randn((shape.batch, 1, 1, 1, shape.k_len)).to(dtype).expand(sizes)
    raise ValueError(f"mask must be one of {', '.join(MASK_KINDS)}, got {kind!r}")


def _pair(kind: PairKind, shape: AttentionShape, dtype: torch.dtype, randn, rand) -> Tensor | None:
    batch, rows, heads, q_len, k_len = shape.batch, shape.rows, shape.heads, shape.q_len, shape.k_len
    sizes = (batch, 1, heads, q_len, k_len)
    if kind == "none":
        return None
    if kind == "contiguous":
        return randn(sizes).to(dtype)
    if kind == "fp32":
        return randn(sizes).float()
    if kind == "transposed":  # ending node: the pair bias of the transposed pair representation
        return randn((batch, 1, heads, k_len, q_len)).to(dtype).transpose(-1, -2)
    if kind == "last_heads":  # straight from the projection [B, Lq, Lk, H]
        return randn((batch, q_len, k_len, heads)).to(dtype).permute(0, 3, 1, 2).unsqueeze(1)
    if kind == "expanded":  # OpenFold's chunking repeats it over the rows
        return randn(sizes).to(dtype).expand(-1, rows, -1, -1, -1)
    if kind == "per_row":
        return randn((batch, rows, heads, q_len, k_len)).to(dtype)
    if kind == "shared_samples":
        return randn((1, *sizes[1:])).to(dtype)
    if kind == "one_head":
        return randn((batch, 1, 1, q_len, k_len)).to(dtype)
    if kind == "minus_inf":
        bias = randn(sizes).to(dtype)
        bias = bias.masked_fill(rand(sizes) < 0.2, float("-inf"))
        bias[..., 0, :] = float("-inf")  # a query that may look nowhere
        return bias
    raise ValueError(f"pair must be one of {', '.join(PAIR_KINDS)}, got {kind!r}")


def _gate(kind: GateKind, like: Tensor, randn) -> Tensor:
    """Values of q's shape and dtype before the sigmoid, as the projection behind a gate gives them."""
    if kind not in GATE_KINDS:
        raise ValueError(f"gate must be one of {', '.join(GATE_KINDS)}, got {kind!r}")
    values = randn(like.shape) * 2
    if kind == "open":  # sigmoids that bf16 rounds to 1
        values = values.abs() + 7
    elif kind == "closed":  # down to what no dtype holds
        values = -values.abs() * 20
    values = values.to(like.dtype)
    if kind == "transposed":  # attention along the other axis of a table
        return _lay_out(values, "ending_node")
    return _lay_out(values, "unaligned") if kind == "unaligned" else values


def make_inputs(
    shape: AttentionShape,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    layout: Layout = "contiguous",
    mask: MaskKind = "additive",
    pair: PairKind | None = None,
    gate: GateKind | None = None,
    spread: float = 1.0,
    seed: int = 0,
) -> AttentionInputs:
    """Random arguments for `shape`, the same numbers on every device.

    Args:
        layout: where the elements of q, k, v and do lie in memory.
        mask, pair: which biases and in which form; pair=None takes what the shape is used with.
        gate: which gate and in which form; None has none.
        spread: standard deviation of q and k; the logits have about its square.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(sizes):
        return torch.randn(sizes, generator=generator).to(device)

    def rand(sizes):
        return torch.rand(sizes, generator=generator).to(device)

    if pair is None:
        pair = "none" if not shape.pair else "shared_samples" if shape.shared_pair else "contiguous"
    q_sizes = (shape.batch, shape.rows, shape.q_len, shape.heads, shape.head_dim)
    k_sizes = (shape.batch, shape.rows, shape.k_len, shape.heads, shape.head_dim)
    q, k = (_lay_out((randn(sizes) * spread).to(dtype), layout) for sizes in (q_sizes, k_sizes))
    v, do = (_lay_out(randn(sizes).to(dtype), layout) for sizes in (k_sizes, q_sizes))
    mask_bias = _mask(mask, shape, dtype, randn, rand)
    pair_bias = _pair(pair, shape, dtype, randn, rand)
    gates = None if gate is None else _gate(gate, q, randn)
    for x in (q, k, v, mask_bias, pair_bias, gates):
        if x is not None and x.dtype != torch.bool:
            x.requires_grad_()
    return AttentionInputs(q, k, v, mask_bias, pair_bias, gates, do)

# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a decoder's training step, in the two ways that they are counted, and peak rates.

    model    what causal attention needs, recomputation not counted: the count behind an MFU
    method   DeepSpeed4Science's and Megatron's: full attention, and a second forward pass for recomputation

One multiplication and one addition are two operations. Embeddings, norms and softmax are not counted; a window is
counted as one document.
"""

import time
from dataclasses import dataclass

import torch

from deepspeed_ds4sci.models.configs import GenSLMConfig

# Dense peak in 16 bits with fp32 accumulation, FLOP/s, from the makers' data sheets; by a part of the device's name.
_PEAKS_16_BIT = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)


@dataclass(frozen=True)
class PeakFlops:
    """What MFU is taken of: FLOP/s of one device, and where the number is from."""

    per_second: float
    source: str


def forward_flops(config: GenSLMConfig, seq_len: int, *, causal: bool = True) -> float:
    """Operations of one sequence's forward pass.

    causal: half of the attention map. False: all of it, as the method counts.
    """
    hidden, head_dim, heads = config.hidden_size, config.head_dim, config.num_heads
    projections = hidden * head_dim * (2 * heads + 2 * config.key_value_heads)  # q, k, v and output
    weights = config.num_layers * (projections + 2 * hidden * config.intermediate_size)
    weights += hidden * config.vocab_size
    pairs = seq_len * seq_len / 2 if causal else seq_len * seq_len
    attention = config.num_layers * 2 * 2 * pairs * heads * head_dim
    return 2 * weights * seq_len + attention


def step_flops(config: GenSLMConfig, seq_len: int, *, count: str = "model") -> float:
    """Operations of one sequence's forward and backward pass, by either count of the module's head.

    Raises:
        ValueError: another count.
    """
    if count == "model":
        return 3 * forward_flops(config, seq_len)
    if count == "method":
        return 4 * forward_flops(config, seq_len, causal=False)
    raise ValueError(f'count must be "model" or "method", got {count!r}')


def peak_flops(device: torch.device, dtype: torch.dtype) -> PeakFlops:
    """The device's peak from its data sheet, for 16 bits on known GPUs; else the rate of a large matrix product."""
    if device.type == "cuda" and dtype.itemsize == 2:
        name = torch.cuda.get_device_name(device)
        for part, peak in _PEAKS_16_BIT:
            if part in name:
                return PeakFlops(peak, f"data sheet of {part}")
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = min(_timed_product(a, b) for _ in range(4))
    return PeakFlops(2 * size**3 / seconds, f"measured, {size} x {size} matrix product")


def _timed_product(a, b):
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    start = time.perf_counter()
    a @ b
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start

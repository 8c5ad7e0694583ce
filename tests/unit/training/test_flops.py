# SPDX-License-Identifier: Apache-2.0
"""FLOP counts against torch's own counter, and against the method's formula."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.training import forward_flops, peak_flops, step_flops


class FullAttention:
    """Two matrix products over the whole map, which torch's counter sees."""

    size = 1

    def positions(self, length, device):
        return torch.arange(length, device=device)

    def __call__(self, q, k, v, **_):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (q @ k.transpose(2, 3) @ v).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_the_forward_count_is_that_of_the_matrix_products(kv_heads):
    config = GenSLMConfig(32, 2, 4, 48, 64, num_kv_heads=kv_heads)
    model = GenSLM(config)
    model.attention = FullAttention()
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    assert forward_flops(config, 16, causal=False) == counter.get_total_flops()
    saved = forward_flops(config, 16, causal=False) - forward_flops(config, 16)
    assert saved == 2 * (2 * 2 * 16 * 16 * 32) / 2  # layers x half of both products


def test_the_two_counts_of_a_step():
    config = GenSLMConfig.named("gpt2-25M")
    hidden, layers, length, vocabulary = config.hidden_size, config.num_layers, 1024, config.vocab_size
    # Narayanan et al. 2021, equation 3, whose output layer is not recomputed.
    published = 96 * length * layers * hidden**2 * (1 + length / (6 * hidden) + vocabulary / (16 * layers * hidden))
    ours = step_flops(config, length, count="method")
    assert ours == pytest.approx(published + 2 * length * hidden * vocabulary)
    assert step_flops(config, length) == 3 * forward_flops(config, length)
    with pytest.raises(ValueError, match="got 'hardware'"):
        step_flops(config, length, count="hardware")


def test_the_peak_of_a_cpu_is_measured():
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak.per_second > 1e9 and peak.source.startswith("measured")


def test_the_peak_of_a_known_gpu_is_its_makers(monkeypatch):
    for name, expected in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4", 312e12),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), torch.bfloat16).per_second == expected

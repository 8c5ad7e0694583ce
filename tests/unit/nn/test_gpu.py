# SPDX-License-Identifier: Apache-2.0
"""The modules on a CUDA GPU, where the op runs its kernels."""

import pytest
import torch

from deepspeed_ds4sci.nn import MSAColumnAttention
from tests.unit.nn.helpers import make_block, make_inputs, randomise

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_stays_near_fp64_in_values_and_gradients(dtype):
    block = make_block(implementation=None).eval()
    inputs = make_inputs(n_seq=6, n_res=19)

    def run(inputs):
        m, z = block(*inputs)
        loss = m.square().mean() + z.square().mean()
        return [m, z, *torch.autograd.grad(loss, list(block.parameters()))]

    expected = run(inputs)
    block.to("cuda", dtype)
    actual = run([x.to("cuda", dtype) for x in inputs])
    limit = 1e-4 if dtype == torch.float32 else 0.1
    # Some gradients are sums that cancel to nothing (a bias of the keys); what is left of them is rounding.
    floor = torch.finfo(dtype).eps * max(x.abs().max().item() for x in expected[2:])
    for a, b in zip(actual, expected, strict=True):
        error = (a.double().cpu() - b).square().mean().sqrt()
        assert error <= limit * b.square().mean().sqrt() + floor


def test_five_thousand_sequences_at_inference_take_memory_linear_in_their_number():
    module = randomise(MSAColumnAttention(256, 32, 8)).to("cuda", torch.bfloat16).eval()
    m = torch.randn(1, 5120, 384, 256, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        module(m)
    # Layer norm, the update in slices and joined, and one slice of q, k, v, gate and output. The logits: 161 GB.
    assert torch.cuda.max_memory_allocated() - before < 5 * m.numel() * m.element_size()

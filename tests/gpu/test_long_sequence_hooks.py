# SPDX-License-Identifier: Apache-2.0
"""Named implementations of attention, ALiBi, and explicit masks on both sides of the threshold, on a CUDA GPU."""

import copy

import pytest
import torch

from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.sequence.masks import BLOCK_ROWS, MaskFactory
from tests.unit.hooks.apply import train, with_hooks

pytestmark = pytest.mark.gpu

TOKENS = 1536


@pytest.fixture(scope="module")
def model():
    return GenSLM(GenSLMConfig(256, 2, 4, 512, TOKENS)).to("cuda")


@pytest.fixture(scope="module")
def batch():
    tokens = torch.randint(5, 69, (2, TOKENS), device="cuda")
    documents = torch.arange(TOKENS, device="cuda").ge(TOKENS // 3).long().expand(2, -1)
    return {"input_ids": tokens, "labels": tokens, "document_ids": documents}


def assert_near(model, batch, **features):
    """The loss and gradients in bf16 under the hooks, near those of the definition in fp32."""
    expected_features = {**features, "attention": {**features.get("attention", {}), "implementation": "math"}}
    reference, *_ = with_hooks(model, **expected_features)
    loss, expected = train(reference, batch)
    ours, *_ = with_hooks(copy.deepcopy(model).bfloat16(), **features)
    our_loss, gradients = train(ours, batch)
    assert abs(our_loss - loss) <= 0.02 * loss
    for name, gradient in gradients.items():
        error = (gradient.float() - expected[name]).norm() / expected[name].norm()
        # The gradient of a key's bias is a sum that cancels to nothing.
        assert error <= 0.05 or name.endswith("query_key_value.bias"), f"{name}: {error:.3f}"


@pytest.mark.parametrize("implementation", ["flash", "cudnn", "efficient", "flex", "tiled"])
def test_named_implementations_of_causal_attention(model, batch, implementation):
    plain = {name: value for name, value in batch.items() if name != "document_ids"}
    assert_near(model, plain, attention={"implementation": implementation})


@pytest.mark.parametrize("implementation", ["efficient", "flex", "tiled"])
def test_documents_in_a_window_under_an_explicit_mask(model, batch, implementation):
    attention = {"implementation": implementation, "sliding_window": 200}
    for threshold in (TOKENS, TOKENS - 1):
        mask = {"kind": "document", "cpu_threshold": threshold}
        assert_near(model, batch, attention=attention, attention_mask=mask)


@pytest.mark.parametrize("implementation", ["efficient", "flex", "tiled"])
def test_alibi_in_place_of_rotary_positions(model, batch, implementation):
    plain = {name: value for name, value in batch.items() if name != "document_ids"}
    assert_near(model, plain, attention={"implementation": implementation}, position_embedding={"kind": "alibi"})


@pytest.mark.parametrize("kind", ["causal", "documents"])
def test_building_in_cpu_memory_takes_the_mask_alone_on_the_device(kind):
    """On the device a block of rows in work comes on top, on either side no second mask."""
    seq_len = 12_288
    documents = torch.arange(seq_len, device="cuda").div(1000, rounding_mode="floor")[None]
    given = {"document_ids": documents} if kind == "documents" else {}
    peaks = {}
    for side, threshold in (("device", seq_len), ("cpu", seq_len - 1)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        mask = MaskFactory("cuda", threshold)(seq_len, **given)
        assert mask.device.type == "cuda"
        peaks[side] = torch.cuda.max_memory_allocated() - before
        del mask
    rounding = 2**21
    assert peaks["cpu"] <= seq_len**2 + rounding
    assert seq_len**2 < peaks["device"] <= seq_len**2 + 24 * BLOCK_ROWS * seq_len + rounding

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that wait in page-locked memory, and kept attention outputs, on a CUDA GPU."""

import copy

import pytest
import torch

from deepspeed_ds4sci.hooks.host_memory import HostSlot
from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from tests.unit.hooks.test_activation_checkpointing import assert_same, gradients, with_hook

pytestmark = pytest.mark.gpu

LAYERS, HIDDEN, TOKENS = 8, 512, 10_000
CHECKPOINT = TOKENS * HIDDEN * 2  # bytes in bf16; not a power of two


@pytest.fixture(autouse=True)
def deterministic_attention(monkeypatch):
    """PyTorch's own attention adds up its query gradients in any order unless told otherwise."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what matrix products ask for then
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def model():
    config = GenSLMConfig(HIDDEN, LAYERS, 8, 2 * HIDDEN, TOKENS)
    return GenSLM(config).to("cuda", torch.bfloat16)


@pytest.fixture(scope="module")
def batch():
    tokens = torch.randint(5, 69, (1, TOKENS), device="cuda")
    return {"input_ids": tokens, "labels": tokens}


def peak_of(model, batch):
    """Peak bytes of one forward and backward pass beyond what was there, weights' gradients included, and those."""
    found = [tensor.clone() for tensor in gradients(model, batch)]
    torch.use_deterministic_algorithms(False)  # its workspaces would be most of the peak
    # Also the warm-up: slots, autotuning. The gradients stay: else they grow in the backward pass while checkpoints
    # go, and the peak of one that has no checkpoints on the device comes at its end.
    model(**batch).loss.backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model(**batch).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    torch.use_deterministic_algorithms(True)
    return peak, found


@pytest.mark.parametrize("kind", ["full", "keep_attention"])
def test_offload_changes_no_bit_and_frees_the_layers_inputs(model, batch, kind):
    plain_peak, expected = peak_of(with_hook(model, kind=kind)[0], batch)
    offloaded, offload = with_hook(model, kind=kind, cpu_offload=True)
    peak, found = peak_of(offloaded, batch)
    assert_same(found, expected)
    # Two tensors are on the device at a time, and one more while the next layer's comes.
    assert plain_peak - peak >= (LAYERS - 3) * CHECKPOINT
    slots = offload.pool._free
    assert len(slots) == LAYERS and all(slot.bytes.is_pinned() for slot in slots)
    assert CHECKPOINT <= slots[0].capacity < CHECKPOINT + 4096


def test_kept_attention_outputs_wait_beside_checkpoints(model, batch):
    def peak(**block):
        return peak_of(with_hook(model, kind="keep_attention", cpu_offload=True, **block)[0], batch)

    plain_peak, expected = peak()
    waiting_peak, found = peak(cpu_offload_attention=True)
    assert_same(found, expected)
    assert plain_peak - waiting_peak >= (LAYERS - 3) * CHECKPOINT


def test_keep_attention_trades_memory_for_the_second_attention(model, batch):
    full_peak, expected = peak_of(with_hook(model, kind="full")[0], batch)
    kept_peak, found = peak_of(with_hook(model, kind="keep_attention")[0], batch)
    assert_same(found, expected)
    assert (LAYERS - 2) * CHECKPOINT <= kept_peak - full_peak <= (LAYERS + 1) * CHECKPOINT


def test_steps_in_a_row_reuse_slots_without_mixing_them_up(model):
    """Copies of one step may still run when the next begins."""
    offloaded, _ = with_hook(model, kind="full", cpu_offload=True)
    plain = copy.deepcopy(model)
    for step in range(4):
        tokens = torch.randint(5, 69, (1, TOKENS - 1000 * step), device="cuda")
        batch = {"input_ids": tokens, "labels": tokens}
        assert_same(gradients(offloaded, batch), gradients(plain, batch))


def test_a_dropped_slot_unlocks_its_pages():
    """Else the next mapping at that address meets a stale registration, and copies from it fail."""
    slot = HostSlot(1 << 20, pinned=True)
    pages = slot.bytes
    assert pages.is_pinned()
    del slot
    assert not pages.is_pinned()

# SPDX-License-Identifier: Apache-2.0
"""Recomputed layers train like kept ones, bit for bit; what waits in CPU memory is freed and used again."""

import contextlib
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deepspeed_ds4sci.hooks.activation_checkpointing import ActivationCheckpointingHook
from deepspeed_ds4sci.hooks.checkpoint_offload import CheckpointOffload, _Away
from deepspeed_ds4sci.hooks.host_memory import HostPool
from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.sequence import blocks
from deepspeed_ds4sci.sequence.kept import keeping_contexts, kept
from tests.distributed import tiny_models
from tests.helpers.live_memory import LiveMemory
from tests.helpers.processes import run_python
from tests.unit.hooks import apply

SETTINGS = [
    {"kind": kind, **others}
    for kind in ("full", "selective", "keep_attention")
    for others in ({}, {"cpu_offload": True}, {"cpu_offload": True, "every_n_layers": 2})
]
SETTINGS += [
    {"kind": "keep_attention", "cpu_offload_attention": True, "cpu_offload": with_checkpoints}
    for with_checkpoints in (False, True)
]


def with_hook(model, **block):
    """A copy of the model with the hook on, and what keeps its checkpoints in CPU memory."""
    model, _, context = apply.with_hooks(model, activation_checkpointing=block)
    return model, context.extras["activation_checkpointing"][0]


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


@pytest.mark.parametrize("block", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["genslm-rotary", "genslm-alibi", "gpt_neox", "gpt2", "llama", "esm"])
def test_trains_bit_for_bit_like_the_plain_model(name, block):
    model = tiny_models.build(name)
    checkpointed, _ = with_hook(model, **block)
    batch = tiny_models.with_padding(tiny_models.batch(name, 2, 16, 0), [16, 11])
    assert_same(gradients(checkpointed, batch), gradients(model, batch))


@pytest.mark.parametrize("implementation", ["flash", "tiled"])
def test_every_memory_feature_at_once(implementation):
    """Tiles are recomputed inside of layers that are recomputed without their attention."""
    model = tiny_models.build("genslm-rotary")
    ours, *_ = apply.with_hooks(
        model,
        attention={"implementation": implementation},
        activation_checkpointing={"kind": "keep_attention", "cpu_offload": True},
        tiling={"mlp": 5, "loss": 7},
    )
    batch = tiny_models.batch("genslm-rotary", 2, 16, 0)
    apply.assert_trains_like(ours, batch, model, batch)


def test_position_ids_that_start_again_mean_what_they_meant():
    """With a cache, which training under recomputation goes without, transformers sees one document."""
    model = tiny_models.build("llama")
    checkpointed, _ = with_hook(model, kind="full")
    batch = {**tiny_models.batch("llama", 2, 16, 0), "position_ids": torch.arange(16)[None] % 6}
    assert_same(gradients(checkpointed, batch), gradients(model, batch))
    packed = {**batch, "use_cache": False}
    assert_same(gradients(checkpointed, packed), gradients(model, packed))
    assert not torch.equal(gradients(model, packed)[0], gradients(model, batch)[0])
    with pytest.raises(ValueError, match="use_cache = True does not go with ds4sci.activation_checkpointing"):
        checkpointed(**batch, use_cache=True)


@pytest.mark.parametrize("block", ['activation_checkpointing={"kind": "full"}', 'tiling={"mlp": 8, "loss": 8}'])
def test_the_first_step_of_a_process_leaves_no_tensor_behind(block):
    """Nor would it if Python did not look for cycles."""
    code = f"""
        import gc, sys
        import torch
        from tests.distributed import tiny_models
        from tests.unit.hooks import apply

        model, *_ = apply.with_hooks(tiny_models.build("genslm-rotary"), {block})
        batch = tiny_models.batch("genslm-rotary", 1, 37, 0)
        gc.collect()
        gc.disable()
        model(**batch).loss.backward()
        batch = None
        print([tuple(x.shape) for x in gc.get_objects() if isinstance(x, torch.Tensor) and 37 in x.shape])
    """
    assert run_python(code, cwd=Path(__file__).parents[3], DS_ACCELERATOR="cpu").splitlines()[-1] == "[]"


def test_two_graphs_at_once_keep_their_own_tensors():
    model = tiny_models.build("llama")
    checkpointed, _ = with_hook(model, kind="full", cpu_offload=True)

    def summed(run):
        run.zero_grad()
        losses = [run(**tiny_models.batch("llama", 1, length, length)).loss for length in (16, 9)]
        sum(losses).backward()
        return [p.grad for p in run.parameters()]

    assert_same(summed(checkpointed), summed(model))


def test_slots_are_used_again_and_follow_the_longest_batch():
    checkpointed, offload = with_hook(tiny_models.build("llama"), kind="full", cpu_offload=True)
    held = []
    for length in (16, 16, 8, 64, 64):
        gradients(checkpointed, tiny_models.batch("llama", 64, length, 0))
        held.append(offload.pool.held_bytes)
    per_layer = 64 * 64 * tiny_models.HIDDEN * 4
    assert held[0] == held[1] == held[2] == tiny_models.LAYERS * per_layer // 4
    assert held[3] == held[4] == tiny_models.LAYERS * per_layer
    assert len(offload.pool._free) == tiny_models.LAYERS


def test_a_forward_pass_without_backward_gives_its_slots_back():
    checkpointed, offload = with_hook(tiny_models.build("llama"), kind="full", cpu_offload=True)
    batch = tiny_models.batch("llama", 2, 16, 0)
    for _ in range(3):
        checkpointed(**batch)
    gradients(checkpointed, batch)
    assert len(offload.pool._free) <= 2 * tiny_models.LAYERS
    with torch.no_grad():
        held = offload.pool.held_bytes
        checkpointed(**batch)
    assert offload.pool.held_bytes == held


def test_the_pool_rounds_up_to_pages_only():
    pool = HostPool(pinned=False)
    slot = pool.take(5 * 2**20 + 1)
    assert slot.capacity == 5 * 2**20 + 4096 == pool.held_bytes
    assert slot.bytes.data_ptr() % 4096 == 0
    pool.give_back(slot)
    assert pool.take(100) is slot  # the smallest that is large enough
    pool.give_back(slot)
    larger = pool.take(6 * 2**20)
    assert larger is not slot and pool.held_bytes == larger.capacity


@pytest.mark.parametrize("kind, runs", [("full", 2), ("keep_attention", 1)])
def test_keep_attention_does_not_attend_again(kind, runs, monkeypatch):
    """Tiled attention: the forward pass of a tile runs once per layer, and once more only where it is recomputed."""
    calls = []
    forward = blocks._tile_forward

    def counted(*args):
        calls.append(1)
        return forward(*args)

    monkeypatch.setattr(blocks, "_tile_forward", counted)
    checkpointed, _ = with_hook(tiny_models.build("genslm-alibi"), kind=kind)
    gradients(checkpointed, tiny_models.batch("genslm-alibi", 1, 16, 0))
    assert len(calls) == runs * tiny_models.LAYERS


class _Counts(torch.utils._python_dispatch.TorchDispatchMode):
    """How often the CPU's fused attention runs."""

    forwards = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.forwards += function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, runs", [("full", 2), ("keep_attention", 1)])
def test_keep_attention_does_not_run_the_fused_kernel_again(kind, runs):
    checkpointed, _ = with_hook(tiny_models.build("llama"), kind=kind)
    with _Counts() as counts:
        gradients(checkpointed, tiny_models.batch("llama", 1, 16, 0))
    assert counts.forwards == runs * tiny_models.LAYERS


def test_keep_attention_refuses_attention_it_cannot_keep():
    checkpointed, _ = with_hook(tiny_models.build("llama"), kind="keep_attention")
    checkpointed.config._attn_implementation = "eager"
    with pytest.raises(NotImplementedError, match="met no attention whose output it can keep in LlamaDecoderLayer"):
        checkpointed(**tiny_models.batch("llama", 1, 16, 0))


def test_a_second_backward_pass_says_that_kept_outputs_are_gone():
    checkpointed, _ = with_hook(tiny_models.build("llama"), kind="keep_attention")
    loss = checkpointed(**tiny_models.batch("llama", 1, 16, 0)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="its backward pass runs a second time"):
        loss.backward()


def test_dropout_masks_are_the_same_in_both_passes():
    model = tiny_models.build("gpt2")
    for name, module in model.named_modules():
        if name.endswith(("drop", "resid_dropout", "mlp.dropout")):  # with dropout, attention is not fused
            module.p = 0.3
    checkpointed, _ = with_hook(model, kind="keep_attention", cpu_offload=True)
    batch = tiny_models.batch("gpt2", 2, 16, 0)
    torch.manual_seed(5)
    expected = gradients(model, batch)
    torch.manual_seed(5)
    assert_same(gradients(checkpointed, batch), expected)


def test_what_attention_returned_comes_back_as_it_lay():
    """Torch's fused kernels give heads and tokens in either order of memory, and a log-sum-exp that stays."""
    left = []

    class Away:
        def __init__(self, tensor):
            assert tensor.is_contiguous()
            left.append(tensor)
            self.tensor = tensor

        def back(self):
            return self.tensor.clone()

    output, lse = torch.randn(2, 5, 3, 4).transpose(1, 2), torch.randn(2, 3, 5)
    first, second = keeping_contexts(Away)
    with first:
        assert kept("attention", lambda: (output, lse, None))[0] is output
    with second:
        found, found_lse, nothing = kept("attention", lambda: None)
    assert torch.equal(found, output) and found.stride() == output.stride() and found.data_ptr() != output.data_ptr()
    assert torch.equal(found_lse, lse) and nothing is None and len(left) == 1


@pytest.mark.parametrize(
    "block, waiting",
    [
        ({}, ""),
        ({"cpu_offload": True}, "; what they start from waits in CPU memory"),
        ({"cpu_offload_attention": True}, "; what attention returned waits in CPU memory"),
        (
            {"cpu_offload": True, "cpu_offload_attention": True},
            "; what they start from and what attention returned wait in CPU memory",
        ),
    ],
)
def test_what_waits_is_told_and_found_at_the_engine(block, waiting):
    block = {"kind": "keep_attention", **block}
    model, (text,), context = apply.with_hooks(tiny_models.build("llama"), activation_checkpointing=block)
    assert text.endswith(f"{tiny_models.LAYERS} of every 1{waiting}")
    engine = SimpleNamespace()
    ActivationCheckpointingHook().after_engine(engine, context)
    gradients(model, tiny_models.batch("llama", 1, 16, 0))
    for name in ("checkpoint", "attention"):
        offload = getattr(engine, f"ds4sci_{name}_offload")
        asked = block.get("cpu_offload" if name == "checkpoint" else "cpu_offload_attention")
        assert (offload is not None and offload.pool.held_bytes > 0) == bool(asked)


def test_a_device_that_it_cannot_copy_from_is_refused():
    message = "checkpointing.cpu_offload and cpu_offload_attention work on CUDA and CPU devices, got meta"
    with pytest.raises(NotImplementedError, match=message):
        CheckpointOffload().leave(torch.empty(1, device="meta"))


def test_nothing_keeps_the_tensor_that_left():
    offload = CheckpointOffload()
    hidden = torch.randn(4, 8, requires_grad=True) * 2
    gone = weakref.ref(hidden)
    with offload.of(hidden):
        out = checkpoint(torch.nn.Linear(8, 8), hidden, use_reentrant=False)
    del hidden
    assert gone() is None
    out.sum().backward()


class _Stream:
    """Counts the events that a stream is made to wait for."""

    def __init__(self):
        self.waits = 0

    def wait_event(self, event):
        self.waits += 1

    def wait_stream(self, stream):
        pass

    def record_event(self):
        return object()


@pytest.fixture
def streams(monkeypatch):
    """[the stream that is current]; tensors on the CPU stand for those on a device."""
    current = [_Stream()]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return current


@pytest.mark.parametrize("kind", ["full", "keep_attention"])
def test_at_most_two_layers_inputs_are_on_the_device(kind, streams, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)

    def start(offload, device):
        offload.pool, offload._stream = HostPool(pinned=False), _Stream()

    monkeypatch.setattr(CheckpointOffload, "_start", start)
    layers, hidden, tokens = 6, 64, 300
    model = GenSLM(GenSLMConfig(hidden, layers, 2, 2 * hidden, tokens))
    batch = {"input_ids": torch.randint(5, 69, (1, tokens))}
    batch["labels"] = batch["input_ids"]

    def peak(**block):
        checkpointed, _ = with_hook(model, kind=kind, **block)
        checkpointed(**batch).loss.backward()  # the gradients are there: else they grow while checkpoints go
        with LiveMemory() as memory:
            checkpointed(**batch).loss.backward()
        return memory.peak

    everything_stays = peak()
    assert everything_stays - peak(cpu_offload=True) >= (layers - 2) * tokens * hidden * 4
    if kind == "keep_attention":
        alone = peak(cpu_offload_attention=True)
        assert everything_stays - alone >= (layers - 2) * tokens * hidden * 4
        assert alone - peak(cpu_offload=True, cpu_offload_attention=True) >= (layers - 2) * tokens * hidden * 4


def test_a_tensor_dropped_anywhere_is_waited_for_on_the_stream_it_came_from(streams):
    owner = streams[0]
    away = _Away(torch.ones(4), HostPool(pinned=False), _Stream(), lambda: None)
    streams[0] = other = _Stream()  # such as that of the thread in which the cycle collector runs
    del away
    assert (owner.waits, other.waits) == (1, 0)


def test_a_tensor_that_comes_back_on_another_stream_is_waited_for_there_too(streams, monkeypatch):
    readers, owner = [], streams[0]
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: readers.append(stream))
    away = _Away(torch.ones(4), HostPool(pinned=False), _Stream(), lambda: None)
    away.settle()
    assert owner.waits == 1
    streams[0] = other = _Stream()
    assert torch.equal(away.back(), torch.ones(4))
    assert (owner.waits, other.waits) == (2, 1) and readers == [other]

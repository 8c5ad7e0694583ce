# SPDX-License-Identifier: Apache-2.0
"""Attention by the package flash-attn-4, of which a stand-in has the functions. The package itself needs a GPU."""

import sys
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deepspeed_ds4sci.config import check_combinations, read_block
from deepspeed_ds4sci.sequence import flash_attn_4, local_attention
from deepspeed_ds4sci.sequence.attention import SequenceParallelAttention
from deepspeed_ds4sci.sequence.kept import keeping_contexts
from tests.unit.sequence.cases import make_qkv
from tests.unit.sequence.naive_attention import naive_attention
from tests.unit.sequence.test_attention import assert_close, run

CUTE = "flash_attn.cute.interface"


def definition(q, k, v, softmax_scale, causal, window_size_left, window_size_right):
    window = tuple(-1 if side is None else side for side in (window_size_left, window_size_right))
    return naive_attention(q, k, v, causal=causal, scale=softmax_scale, window=window)


# fmt: off
def _flash_attn_fwd(q, k, v, softmax_scale=None, causal=False, window_size_left=None, window_size_right=None,
                    return_lse=False):
    assert return_lse and q.shape[-1] in (24, 88, 120)
    CALLS.append("forward")
    MASKS.append((causal, window_size_left, window_size_right))
    output = definition(q, k, v, softmax_scale, causal, window_size_left, window_size_right)
    return output, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), None, None, None


def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, window_size_left=None,
                    window_size_right=None, deterministic=False):
    # fmt: on
    assert dout.is_contiguous() and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    CALLS.append("backward")
    MASKS.append((causal, window_size_left, window_size_right))
    with torch.enable_grad():
        qkv = [x.detach().requires_grad_() for x in (q, k, v)]
        output = definition(*qkv, softmax_scale, causal, window_size_left, window_size_right)
        assert torch.equal(output, out)
        return torch.autograd.grad(output, qkv, dout)


CALLS, MASKS = [], []  # what was called, and under which masks


def install(monkeypatch, **functions):
    """Under the package's name, as if on a GPU that it takes."""
    CALLS.clear()
    interface = types.ModuleType(CUTE)
    vars(interface).update(dict(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd) | functions)
    monkeypatch.setitem(sys.modules, CUTE, interface)


def as_on_a_gpu(monkeypatch, **functions):
    install(monkeypatch, **functions)
    monkeypatch.setattr(flash_attn_4, "unavailable_reason", lambda device_type: None)
    monkeypatch.setattr(flash_attn_4, "_unsuited_inputs", lambda q: None)
    monkeypatch.setattr(flash_attn_4, "_CHECKED_TOKENS", 9)
    monkeypatch.setattr(flash_attn_4, "_CHECKED_WINDOW", (4, 1))
    flash_attn_4._wrong_gradient.cache_clear()


@pytest.fixture
def package(monkeypatch):
    as_on_a_gpu(monkeypatch)
    yield
    flash_attn_4._wrong_gradient.cache_clear()


@pytest.mark.parametrize(
    "arguments, checked, asked",
    [
        (dict(causal=True), (True, None, 0), (True, None, 0)),
        (dict(causal=False), (False, None, None), (False, None, None)),
        (dict(causal=True, window=4), (True, 4, 0), (True, 3, 0)),
        (dict(causal=False, window=(3, 2)), (False, 4, 1), (False, 3, 2)),
    ],
    ids=["causal", "plain", "window", "both sides"],
)
def test_the_package_is_called_with_its_own_arguments(package, arguments, checked, asked):
    *qkv, do = make_qkv(2, 9, 4, 2, 5, torch.float64)
    attention = SequenceParallelAttention(implementation="flash_attn_4")
    for masks in ([checked, asked], [asked]):  # its gradients are compared the first time, under the same kind of mask
        CALLS.clear()
        MASKS.clear()
        assert_close(run(attention, qkv, do, **arguments), run(naive_attention, qkv, do, **arguments), 1e-12)
        assert ["forward", "backward"] * len(masks) == CALLS and [mask for mask in masks for _ in range(2)] == MASKS
    CALLS.clear()
    with torch.no_grad():
        attention(*(x[:, :, :2] for x in qkv), **arguments)
    assert CALLS == ["forward"]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_wrong_gradients_are_noticed(monkeypatch, wrong):
    def backward(q, k, v, out, dout, lse, softmax_scale, causal, window_size_left, window_size_right, deterministic):
        found = _flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale, causal, window_size_left, window_size_right, deterministic
        )
        return [x * (0.9 if i == wrong else 1) for i, x in enumerate(found)]

    as_on_a_gpu(monkeypatch, _flash_attn_bwd=backward)
    qkv = [x.requires_grad_() for x in make_qkv(1, 5, 4, 2, 88)[:3]]
    attention = SequenceParallelAttention(implementation="flash_attn_4")
    state = torch.get_rng_state()
    message = rf'"flash_attn_4" computes a wrong {("dq", "dk", "dv")[wrong]} here \(head dim 88, 2 query heads per'
    with pytest.raises(NotImplementedError, match=message):
        attention(*qkv, causal=True)
    assert torch.equal(torch.get_rng_state(), state)
    flash_attn_4._wrong_gradient.cache_clear()


def test_heads_are_padded_to_what_the_package_computes_right():
    """4.0.0b36 on Hopper, every multiple of 8 up to 128 tried, and 136, 160, 192, 200, 256 beyond."""
    padded = {dim: flash_attn_4._computed_head_dim(dim) for dim in range(1, 257)}
    right = {24, 32, 56, 64, 88, 96, 120, 128}
    assert all(padded[dim] == min(other for other in right if other >= dim) for dim in range(1, 129))
    assert all(padded[dim] == -(-dim // 8) * 8 for dim in range(129, 257))


@pytest.mark.parametrize("wanted", [False, True])
def test_gradients_are_deterministic_where_torch_is_asked_for_it(package, wanted):
    *qkv, do = make_qkv(1, 5, 2, 2, 8, torch.float64)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        run(SequenceParallelAttention(implementation="flash_attn_4"), qkv, do, causal=True)
    finally:
        torch.use_deterministic_algorithms(before)
    assert CALLS == ["forward", "backward"] * 2


def test_recomputation_takes_what_it_returned(package):
    *qkv, do = make_qkv(1, 7, 2, 1, 8, torch.float64)
    attention = SequenceParallelAttention(implementation="flash_attn_4")

    def layer(q, k, v):
        return attention(2 * q, k, v, causal=True)

    def recomputed(q, k, v):
        contexts = keeping_contexts()
        output = checkpoint(layer, q, k, v, use_reentrant=False, context_fn=lambda: contexts)
        assert contexts[0].count == 1
        return output

    expected = run(layer, qkv, do)
    CALLS.clear()
    assert_close(run(recomputed, qkv, do), expected, 1e-15)
    assert CALLS == ["forward", "backward"]
    assert local_attention.unkept_reason("flash_attn_4") is None


def test_the_two_packages_are_told_apart(monkeypatch):
    """Both are in a folder flash_attn, which neither needs the other for."""
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.delitem(sys.modules, "flash_attn.flash_attn_interface", raising=False)
    assert "the package flash_attn cannot be imported" in local_attention.unavailable_reason("flash_attn", "cuda")
    assert '"flash_attn_4" needs a CUDA GPU' in local_attention.unavailable_reason("flash_attn_4", "cpu")
    old = types.ModuleType("flash_attn.flash_attn_interface")
    old.flash_attn_func = None
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", old)
    monkeypatch.delitem(sys.modules, CUTE)
    assert local_attention.unavailable_reason("flash_attn", "cuda") is None
    reason = local_attention.unavailable_reason("flash_attn_4", "cuda")
    assert "the package flash-attn-4, which cannot be imported (No module named" in reason
    assert "with CUDA 13 'deepspeed_ds4sci[flash-attn-4-cu13]'" in reason


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (dict(_flash_attn_bwd=None), "_flash_attn_bwd is missing"),
        (
            dict(_flash_attn_fwd=lambda q, k, v, softmax_scale, causal: None, _flash_attn_bwd=None),
            "_flash_attn_fwd does not take return_lse, window_size_left, window_size_right and _flash_attn_bwd is",
        ),
    ],
    ids=["function", "arguments"],
)
def test_another_version_of_the_package_is_refused(monkeypatch, functions, message):
    install(monkeypatch, **functions)
    x = torch.zeros(1, 4, 2, 8)
    message = f"4.0.0b36 of the package flash-attn-4; in the one installed {message}"
    with pytest.raises(NotImplementedError, match=message):
        SequenceParallelAttention(implementation="flash_attn_4")(x, x, x)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "message"),
    [
        ((9, 0), torch.float32, 64, "takes fp16 or bf16, got torch.float32"),
        ((9, 0), torch.bfloat16, 264, "takes a head dim of at most 256, got 264"),
        ((10, 0), torch.bfloat16, 192, "takes a head dim of at most 128, or 256, on this GPU, got 192"),
        ((8, 0), torch.bfloat16, 64, r"is for GPUs of compute capability 9.0 and 10.x, got 8.0"),
        ((9, 0), torch.bfloat16, 256, None),
        ((10, 3), torch.float16, 256, None),
        ((10, 0), torch.float16, 128, None),
    ],
)
def test_gpus_dtypes_and_head_dims_are_checked(monkeypatch, capability, dtype, head_dim, message):
    install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    x = torch.zeros(1, 4, 2, head_dim, dtype=dtype)
    found = flash_attn_4.unavailable_reason("cuda") or flash_attn_4._unsuited_inputs(x)
    assert found is None if message is None else found.startswith(f'"flash_attn_4" {message}')


def test_the_head_dim_that_is_refused_is_the_one_given(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(flash_attn_4, "unavailable_reason", lambda device_type: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    x = torch.zeros(1, 4, 2, 257, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="takes a head dim of at most 256, got 257"):
        SequenceParallelAttention(implementation="flash_attn_4")(x, x, x)


@pytest.mark.parametrize(
    "features, message",
    [
        ({"attention_mask": {"kind": "causal"}}, '"flash_attn_4" does not support mask; "tiled" does'),
        ({"position_embedding": {"kind": "alibi"}}, '"flash_attn_4" does not support alibi; "tiled" does'),
    ],
)
def test_masks_and_alibi_are_refused_by_the_config_without_the_package(features, message):
    config = {"ds4sci": {"attention": {"implementation": "flash_attn_4"}, **features}}
    with pytest.raises(NotImplementedError, match=f"ds4sci.attention.implementation: {message}"):
        check_combinations(read_block(config), config)
    window = {"ds4sci": {"attention": {"implementation": "flash_attn_4", "sliding_window": 4}}}
    check_combinations(read_block(window), window)

# SPDX-License-Identifier: Apache-2.0
"""Adapters: layouts in and out, and what they decline. Kernels that need a GPU are replaced by plain PyTorch here."""

import ctypes
import dataclasses
import sys
import types

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from tests.benchmarks.case import Case, make_inputs, with_samples_as_rows
from tests.benchmarks.peers import PEERS, Ours, deepspeed, flex
from tests.benchmarks.peers.eager import eager_attention
from tests.benchmarks.verify import errors_of, expect, wrong_reason
from tests.helpers.shapes import AttentionShape

CPU = torch.device("cpu")
SQUARE = AttentionShape("square", 2, 12, 12, 12, 3, 16, "test")
LONG_KEYS = AttentionShape("long-keys", 1, 3, 6, 10, 2, 16, "test")
SHARED = AttentionShape("shared", 3, 2, 9, 9, 2, 16, "test", shared_pair=True)
NO_PAIR = AttentionShape("no-pair", 1, 4, 20, 20, 2, 16, "test", pair=False)
ALL = (SQUARE, LONG_KEYS, SHARED, NO_PAIR)


def case_of(shape: AttentionShape, **changes) -> Case:
    return dataclasses.replace(Case.of(shape, "fp32", "random", True), **changes)


def check(peer, case: Case, backward: bool = True) -> None:
    inputs = make_inputs(case, CPU)
    folded = with_samples_as_rows(case, inputs)
    call = peer.bind(*((case, inputs) if peer.shares_pair_bias else folded))
    reason = wrong_reason(case, errors_of(case, call, expect(*folded), backward))
    assert reason is None, reason


@pytest.mark.parametrize("shape", ALL, ids=str)
@pytest.mark.parametrize("mask", ["random", "none"])
@pytest.mark.parametrize("peer", [PEERS["eager"], PEERS["sdpa"], Ours("reference")], ids=lambda peer: peer.name)
def test_peers_of_the_cpu_are_right(peer, shape, mask):
    assert peer.unavailable_reason("cpu") is None
    check(peer, case_of(shape, mask=mask))


@pytest.mark.parametrize("shape", ALL, ids=str)
@pytest.mark.parametrize("fuses_gate", [True, False])
def test_the_gate_is_applied_in_the_op_or_apart(fuses_gate, shape):
    case = case_of(shape, gate=True)
    check(Ours("tiled", fuses_gate), case)
    call = Ours("tiled", fuses_gate).bind(case, make_inputs(case, CPU))
    assert "gate" in call.leaves and ("Mul" in type(call.forward().grad_fn).__name__) == (not fuses_gate)


@pytest.mark.parametrize("shape", ALL, ids=str)
@pytest.mark.parametrize("mask", ["random", "none"])
def test_flex_score_functions(monkeypatch, shape, mask):
    def forward_only(q, k, v, score_mod):  # torch has no backward of it on the CPU
        return flex_attention(q.detach(), k.detach(), v.detach(), score_mod=score_mod)

    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: forward_only)
    check(PEERS["flex"], case_of(shape, mask=mask), backward=False)


def test_trifast_layout(monkeypatch):
    def triangle_attention(q, k, v, b, mask):  # q [B, H, N, L, D], b [B, H, L, L], mask [B, N, L], True = drop
        bias = torch.zeros(mask.shape).masked_fill(mask, -torch.inf)[:, None, :, None, :]
        return eager_attention(q, k, v, bias, b[:, :, None])

    monkeypatch.setitem(sys.modules, "trifast", types.SimpleNamespace(triangle_attention=triangle_attention))
    for mask in ("random", "none"):
        check(PEERS["trifast"], case_of(SQUARE, mask=mask))


def test_cuequivariance_layout(monkeypatch):
    def triangle_attention(q, k, v, bias, mask=None):  # q [B, N, H, L, D], bias [B, 1, H, L, L], mask True = keep
        added = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        return eager_attention(q, k, v, added, bias)

    fake = types.SimpleNamespace(triangle_attention=triangle_attention)
    monkeypatch.setitem(sys.modules, "cuequivariance_torch", fake)
    for mask in ("random", "none"):
        check(PEERS["cueq"], case_of(SQUARE, mask=mask))
    check(PEERS["cueq"], case_of(SHARED))


def test_bionemo_ir_layout(monkeypatch):
    class Attention:
        def __init__(self, layer, heads, head_dim):
            pass

        def forward(self, q, k, v, biases):
            lengths, pair_bias = biases
            assert torch.equal(lengths, torch.full((2, 12), 12, dtype=torch.int32))
            q, k, v = (x.transpose(2, 3) for x in (q, k, v))
            return eager_attention(q, k, v, None, pair_bias[:, None]).transpose(2, 3)

    name = "bionemo_ir._torch.attention_backend.triangle_attention.cutedsl"
    parts = name.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(TriangleAttentionCuTeLeftMask=Attention))
    assert not PEERS["bionemo_ir"].has_backward
    check(PEERS["bionemo_ir"], case_of(SQUARE, mask="none"), backward=False)


class PlainKernels:
    """DeepSpeed's two entry points in plain PyTorch: they write into tensors that its wrapper allocated."""

    @staticmethod
    def attend(q, k, v, bias1, bias2):
        q, k, v = (x.transpose(2, 3) for x in (q, k, v))
        biases = [bias if bias.numel() else None for bias in (bias1, bias2)]
        return eager_attention(q, k, v, *biases).transpose(2, 3)

    def attention(self, q, k, v, bias1, bias2, o, lse):
        assert lse.shape == (q.shape[0] * q.shape[1], q.shape[3], -(-q.shape[2] // 32) * 32)
        o.copy_(self.attend(q, k, v, bias1, bias2))

    def attention_bwd(self, do, q, k, v, o, lse, delta, bias1, bias2, dq, dk, dv, dbias1, dbias2):
        assert dbias1.numel() == 0  # the mask is a constant
        targets = [dq, dk, dv, dbias2]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v, bias2)]
            o = self.attend(*leaves[:3], bias1, leaves[3])
            wanted = [x for x, target in zip(leaves, targets, strict=True) if target.numel()]
            gradients = torch.autograd.grad(o, wanted, do)
        for target, gradient in zip([x for x in targets if x.numel()], gradients, strict=True):
            target.copy_(gradient)


@pytest.mark.parametrize("shape", [SQUARE, SHARED, NO_PAIR], ids=str)
def test_deepspeed_wrapper_is_its_own(monkeypatch, shape):
    monkeypatch.setattr(deepspeed, "Kernels", lambda path: PlainKernels())
    monkeypatch.setattr(deepspeed, "_library", lambda dtype: "unused")
    deepspeed.own_attention.cache_clear()
    wrapper = deepspeed.own_attention("fp32")
    assert wrapper.__code__.co_filename.endswith("deepspeed/ops/deepspeed4science/evoformer_attn.py")
    longer = dataclasses.replace(shape, q_len=20, k_len=20)  # it asserts L > 16
    check(PEERS["deepspeed"], case_of(longer))
    deepspeed.own_attention.cache_clear()


def test_deepspeed_describes_tensors_for_c():
    assert ctypes.sizeof(deepspeed._Tensor) == 8 * (1 + 1 + 5 + 5 + 1)
    tensor = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    described, empty = deepspeed._describe((tensor, torch.tensor([], dtype=torch.float32)))
    assert (described.data, described.dims, described.dtype) == (tensor.data_ptr(), 3, 1)
    assert (described.sizes[:3], described.strides[:3]) == ([2, 3, 4], [12, 4, 1])
    assert (empty.sizes[0], empty.dtype) == (0, 2)


def test_deepspeed_reports_what_its_library_says():
    with pytest.raises(RuntimeError, match="DeepSpeed's op: no CUDA device"):
        deepspeed.Kernels._check(b"no CUDA device")


@pytest.mark.parametrize(
    ("name", "shape", "changes", "reason"),
    [
        ("trifast", LONG_KEYS, {}, "square shapes only"),
        ("trifast", SQUARE, {"pair": False}, "needs a pair bias"),
        ("trifast", SQUARE, {"head_dim": 24}, "power of two"),
        ("cueq", NO_PAIR, {}, "needs a pair bias"),
        ("cueq", SQUARE, {"head_dim": 12}, "multiple of 8"),
        ("bionemo_ir", SQUARE, {}, "prefix masks only"),
        ("bionemo_ir", LONG_KEYS, {"mask": "none"}, "triangle attention only"),
        ("bionemo_ir", SQUARE, {"mask": "none"}, "16-bit only"),
        ("deepspeed", LONG_KEYS, {}, "Lq = Lk only"),
        ("deepspeed", SQUARE, {}, "L > 16 only"),
        ("deepspeed", SQUARE, {"q_len": 20, "k_len": 20, "batch": 65536}, "B \\* N <= 65535 only"),
        ("deepspeed", SQUARE, {"q_len": 20, "k_len": 20, "head_dim": 128}, "head dim <= 64 only"),
        ("deepspeed", SQUARE, {"q_len": 20, "k_len": 20}, "library not prepared for fp32"),
    ],
)
def test_peers_say_why_they_decline(name, shape, changes, reason):
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(PEERS[name].refused_reason(case_of(shape, **changes)))


@pytest.mark.parametrize("name", ["flex", "trifast", "cueq", "bionemo_ir", "deepspeed"])
def test_peers_of_the_gpu_are_missing_on_a_cpu(name):
    assert PEERS[name].unavailable_reason("cpu")


def test_ours_passes_on_why_it_cannot_run():
    assert "sm90" in Ours("sm90").unavailable_reason("cpu")


def test_ours_declines_a_case_that_its_named_implementation_does_not_take():
    case = case_of(SQUARE)
    with pytest.raises(NotImplementedError, match='"sm90" cannot run this problem: needs a CUDA device'):
        Ours("sm90").bind(case, make_inputs(case, CPU))

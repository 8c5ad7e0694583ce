# SPDX-License-Identifier: Apache-2.0
"""Attention by the package flash-attn-4, against fp64 by the project's bar, and kept by recomputation."""

from types import SimpleNamespace

import pytest
import torch

from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.sequence import flash_attn_4
from deepspeed_ds4sci.sequence.local_attention import local_attention
from deepspeed_ds4sci.sequence.scores import ScoreRules
from tests.benchmarks.causal_accuracy import TENSORS, measure
from tests.helpers.numerics import assert_no_worse_than_eager
from tests.unit.hooks.apply import train, with_hooks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        flash_attn_4.unavailable_reason("cuda") is not None, reason=str(flash_attn_4.unavailable_reason("cuda"))
    ),
]


def eager(q, k, v, rules):
    """The definition, every step rounded to the dtype of q."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    positions = torch.arange(q.shape[2], device=q.device)
    distance = positions[:, None] - positions
    keep = torch.ones_like(distance, dtype=torch.bool)
    if rules.left is not None:
        keep &= distance <= rules.left
    if rules.right is not None:
        keep &= -distance <= rules.right
    scores = ((q * rules.scale) @ k.mT).masked_fill(~keep, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def run(attention, packed, heads, do, rules):
    packed = packed.detach().requires_grad_()
    output = attention(*packed.split(heads, 2), rules)
    (gradient,) = torch.autograd.grad(output, packed, do)
    return [output.detach(), *gradient.split(heads, 2)]


@pytest.mark.parametrize(
    ("seq_len", "heads", "groups", "head_dim", "left", "right", "dtype"),
    [
        (1000, 4, 4, 120, None, 0, torch.bfloat16),  # our 2.5B decoder's heads
        (1000, 4, 4, 120, None, None, torch.float16),
        (777, 6, 2, 64, None, 0, torch.bfloat16),  # grouped keys
        (777, 4, 1, 128, 99, 0, torch.bfloat16),  # window before the query
        (600, 4, 4, 75, 50, 20, torch.float16),  # window on both sides; of 80 it computes wrong gradients
        (500, 4, 2, 110, None, 0, torch.bfloat16),  # and of 112
        (1, 2, 2, 64, None, 0, torch.bfloat16),
        (300, 2, 2, 256, None, 0, torch.bfloat16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_it_is_no_worse_than_eager(seq_len, heads, groups, head_dim, left, right, dtype):
    torch.manual_seed(0)
    sizes = (heads, groups, groups)
    packed = torch.randn(2, seq_len, sum(sizes), head_dim, device="cuda", dtype=dtype)
    do = torch.randn(2, seq_len, heads, head_dim, device="cuda", dtype=dtype)
    rules = ScoreRules(head_dim**-0.5, left, right)

    def named(q, k, v, rules):
        return local_attention(q, k, v, rules, "flash_attn_4")

    actual = run(named, packed, sizes, do, rules)
    expected = run(eager, packed.double(), sizes, do.double(), rules)
    plain = run(eager, packed, sizes, do, rules)
    for name, ours, theirs, reference in zip(("o", "dq", "dk", "dv"), actual, plain, expected, strict=True):
        # One key has all the weight: the gradients of q and k are sums that cancel to nothing.
        magnitude = 1.0 if seq_len == 1 else None
        assert_no_worse_than_eager(name, ours, theirs, reference, magnitude=magnitude)


@pytest.mark.parametrize("head_dim", [120, 128])  # of our 2.5B decoder, of Llama's
def test_it_is_as_exact_at_the_lengths_that_train(head_dim):
    """Two of all heads against fp64, all of them against cuDNN's."""
    arguments = (65536, 3840 // head_dim, head_dim, ["cudnn", "flash_attn_4"], torch.device("cuda"), torch.bfloat16, 2)
    _, row = measure(*arguments)
    assert row["finite"] and all(row["difference"][name] < 0.01 for name in TENSORS)
    for name in TENSORS:
        assert row["errors"][name]["rms"] <= row["eager"][name]["rms"], name
        assert row["errors"][name]["max"] <= 2 * row["eager"][name]["max"], name


@pytest.mark.parametrize("cpu_offload", [False, True])
def test_recomputation_takes_what_it_returned(monkeypatch, cpu_offload):
    """Once per layer, and every gradient to the bit."""
    calls = []
    package, _ = flash_attn_4._package()

    def forward(*args, **kwargs):
        calls.append(1)
        return package._flash_attn_fwd(*args, **kwargs)

    model = GenSLM(GenSLMConfig(256, 2, 4, 512, 1536)).to("cuda", torch.bfloat16)
    tokens = torch.randint(5, 69, (2, 1536), device="cuda")
    batch = {"input_ids": tokens, "labels": tokens}
    attention = {"implementation": "flash_attn_4"}
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        loss, expected = train(with_hooks(model, attention=attention)[0], batch)
        counted = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=package._flash_attn_bwd)
        monkeypatch.setattr(flash_attn_4, "_package", lambda: (counted, None))
        for kind, count in (("full", 4), ("keep_attention", 2)):
            calls.clear()
            checkpointing = {"kind": kind, "cpu_offload": cpu_offload}
            if kind == "keep_attention":
                checkpointing["cpu_offload_attention"] = cpu_offload
            ours, *_ = with_hooks(model, attention=attention, activation_checkpointing=checkpointing)
            our_loss, gradients = train(ours, batch)
            assert our_loss == loss and len(calls) == count
            assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_it_does_not_take_is_refused():
    rules = ScoreRules(1.0, None, 0)
    for shape, dtype, message in (
        ((1, 8, 2, 64), torch.float32, "takes fp16 or bf16, got torch.float32"),
        ((1, 8, 2, 264), torch.bfloat16, "takes a head dim of at most .*, got 264"),
    ):
        x = torch.zeros(shape, dtype=dtype, device="cuda")
        with pytest.raises(NotImplementedError, match=f'"flash_attn_4" {message}'):
            local_attention(x, x, x, rules, "flash_attn_4")

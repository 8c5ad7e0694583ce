# SPDX-License-Identifier: Apache-2.0
"""Attention on one rank: every implementation and feature against the element-by-element definition."""

import functools
import sys
import types

import pytest
import torch

from deepspeed_ds4sci.sequence import blocks, local_attention, scores
from deepspeed_ds4sci.sequence.attention import SequenceParallelAttention
from tests.unit.sequence.cases import CASES, block_rule, case_arguments, make_qkv
from tests.unit.sequence.naive_attention import naive_attention

BATCH, SEQ_LEN, HEADS, GROUPS, HEAD_DIM = 2, 13, 4, 2, 5


def run(attention, qkv, do, **arguments):
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    output = attention(*qkv, **arguments)
    return [output, *torch.autograd.grad(output, qkv, do)]


def assert_close(actual, expected, limit):
    for name, got, want in zip(("o", "dq", "dk", "dv"), actual, expected, strict=True):
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        assert error <= limit, f"{name}: error {error:.2e} of the maximum > {limit:.0e}"


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles with a remainder even at test sizes."""
    monkeypatch.setattr(blocks, "TILE", 4)
    monkeypatch.setattr(scores, "DOCUMENT_BLOCK", 3)


@functools.cache
def definition(name):
    """The definition's output and gradients in fp64: slow, so once for all implementations."""
    *qkv, do = make_qkv(BATCH, SEQ_LEN, HEADS, GROUPS, HEAD_DIM, torch.float64)
    arguments = case_arguments(name, BATCH, SEQ_LEN, HEADS)
    return run(naive_attention, qkv, do, **arguments)


@pytest.mark.parametrize("name", CASES)
def test_tiled_is_the_definition(name, small_tiles):
    *qkv, do = make_qkv(BATCH, SEQ_LEN, HEADS, GROUPS, HEAD_DIM, torch.float64)
    arguments = case_arguments(name, BATCH, SEQ_LEN, HEADS)
    expected = definition(name)
    assert_close(run(SequenceParallelAttention(implementation="tiled"), qkv, do, **arguments), expected, 1e-12)
    qkv, do = [x.float() for x in qkv], do.float()
    assert_close(run(SequenceParallelAttention(implementation="tiled"), qkv, do, **arguments), expected, 2e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["auto", "math"])
def test_sdpa_is_the_definition(name, implementation):
    *qkv, do = make_qkv(BATCH, SEQ_LEN, HEADS, GROUPS, HEAD_DIM, torch.float64)
    arguments = case_arguments(name, BATCH, SEQ_LEN, HEADS)
    expected = definition(name)
    attention = SequenceParallelAttention(implementation=implementation)
    assert_close(run(attention, qkv, do, **arguments), expected, 1e-12)


@pytest.mark.parametrize("name", ["bidirectional", "window_pair", "padding", "mask", "mask_of_keys", "everything"])
def test_flex_forward_is_the_definition(name):
    *qkv, _ = make_qkv(BATCH, SEQ_LEN, HEADS, GROUPS, HEAD_DIM, torch.float64)
    arguments = case_arguments(name, BATCH, SEQ_LEN, HEADS)
    output = SequenceParallelAttention(implementation="flex")(*(x.float() for x in qkv), **arguments)
    torch.testing.assert_close(output.double(), definition(name)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_named_is_the_definition(causal):
    *qkv, do = make_qkv(BATCH, SEQ_LEN, HEADS, HEADS, HEAD_DIM, torch.float32)
    expected = run(naive_attention, qkv, do, causal=causal)
    assert_close(run(SequenceParallelAttention(implementation="flash"), qkv, do, causal=causal), expected, 2e-6)


@pytest.mark.parametrize("head_dim", [115, 75, 90, 70, 82, 110])
def test_head_dims_of_genome_models(head_dim):
    *qkv, do = make_qkv(1, 9, 2, 2, head_dim, torch.float64)
    expected = run(naive_attention, qkv, do, causal=True)
    for implementation in ("auto", "math", "tiled"):
        actual = run(SequenceParallelAttention(implementation=implementation), qkv, do, causal=True)
        assert actual[0].shape == (1, 9, 2, head_dim)
        assert_close(actual, expected, 1e-12)


def test_tiled_gradcheck(small_tiles):
    *qkv, _ = make_qkv(1, 7, 2, 1, 3, torch.float64)
    qkv = [x.requires_grad_() for x in qkv]
    slopes = torch.tensor([0.5, 0.1])
    attention = SequenceParallelAttention(implementation="tiled")
    torch.manual_seed(3)

    def with_dropout(q, k, v):
        torch.manual_seed(3)
        return attention(q, k, v, causal=True, alibi_slopes=slopes, window=4, dropout_p=0.3)

    assert torch.autograd.gradcheck(with_dropout, qkv)


@pytest.mark.parametrize("implementation", ["tiled", "math", "auto"])
def test_rows_without_keys_give_zero_and_no_gradient(implementation):
    *qkv, do = make_qkv(1, 6, 2, 2, 4)
    documents = torch.tensor([[0, 0, 0, 0, -1, -1]])
    outputs = run(
        SequenceParallelAttention(implementation=implementation), qkv, do, causal=False, document_ids=documents
    )
    for tensor in outputs:
        assert torch.isfinite(tensor).all()
        assert (tensor[:, 4:] == 0).all()
    nothing = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    for tensor in run(SequenceParallelAttention(implementation=implementation), qkv, do, causal=True, mask=nothing):
        assert (tensor == 0).all()


def test_bf16_is_as_good_as_eager():
    *qkv, do = make_qkv(2, 64, 4, 2, 16, torch.bfloat16)
    arguments = case_arguments("alibi", 2, 64, 4)
    exact = run(SequenceParallelAttention(implementation="math"), [x.double() for x in qkv], do.double(), **arguments)
    actual = run(SequenceParallelAttention(implementation="tiled"), qkv, do, **arguments)
    assert actual[0].dtype == torch.bfloat16
    assert_close(actual, exact, 1e-2)


def test_tiles_that_hold_nothing_are_skipped(monkeypatch):
    """Work follows the documents and the window in place of the square of the length."""
    monkeypatch.setattr(blocks, "TILE", 64)
    monkeypatch.setattr(scores, "DOCUMENT_BLOCK", 16)
    computed = []
    tile_forward = blocks._tile_forward
    monkeypatch.setattr(blocks, "_tile_forward", lambda *a: computed.append(a[4:6]) or tile_forward(*a))
    *qkv, _ = make_qkv(2, 512, 1, 1, 4)
    attention = SequenceParallelAttention(implementation="tiled")
    documents = torch.arange(512).div(128, rounding_mode="floor").repeat(2, 1)

    def tiles(**arguments):
        computed.clear()
        attention(*qkv, **arguments)
        return len(computed)

    assert tiles(causal=False) == 64 and tiles(causal=True) == 36
    assert tiles(causal=False, document_ids=documents) == 4 * 4
    assert tiles(causal=True, document_ids=documents) == 4 * 3
    assert tiles(causal=True, window=64) == 8 + 7
    documents[1] = 0  # the other sample is one document
    assert tiles(causal=False, document_ids=documents) == 64


def test_autocast_does_not_reach_inside():
    *qkv, do = make_qkv(1, 20, 2, 2, 8)
    attention, slopes = SequenceParallelAttention(implementation="tiled"), torch.tensor([0.1, 0.2])
    expected = run(attention, qkv, do, alibi_slopes=slopes)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(attention, qkv, do, alibi_slopes=slopes)
    assert all(torch.equal(got, want) for got, want in zip(actual, expected, strict=True))


def test_dropout_agrees_between_implementations_and_repeats_with_the_seed():
    *qkv, do = make_qkv(2, 33, 4, 2, 8, torch.float64)
    results = []
    for implementation in ("tiled", "math", "tiled"):
        torch.manual_seed(11)
        attention = SequenceParallelAttention(implementation=implementation)
        results.append(run(attention, qkv, do, causal=True, dropout_p=0.25))
    assert_close(results[1], results[0], 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
    torch.manual_seed(12)
    assert not torch.equal(run(attention, qkv, do, causal=True, dropout_p=0.25)[0], results[0][0])


def test_dropout_drops_the_asked_share_independently_of_axes():
    rules = local_attention.ScoreRules(scale=1.0, dropout_p=0.25, dropout_seed=torch.tensor(7))
    factor = rules.dropout_factor(torch.empty(2, 3, 256, 256), (0, 256), (0, 256))
    dropped = (factor == 0).double()
    assert factor.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(dropped.mean() - 0.25) < 0.003
    for axis in range(4):
        others = [i for i in range(4) if i != axis]
        spread = (dropped.mean(others) - 0.25).abs().max()
        assert spread < 5 * (0.25 * 0.75 / (dropped.numel() / dropped.shape[axis])) ** 0.5
    flat = dropped.flatten(0, 2)
    assert flat.corrcoef().fill_diagonal_(0).abs().max() < 0.45  # 1536 rows of 256
    part = rules.for_heads(1, 3).dropout_factor(torch.empty(2, 2, 10, 20), (100, 110), (30, 50))
    assert torch.equal(part, factor[:, 1:3, 100:110, 30:50])


def test_changing_the_mask_changes_the_output():
    *qkv, _ = make_qkv(1, 8, 2, 2, 4)
    attention = SequenceParallelAttention()
    one = attention(*qkv, causal=False, mask=block_rule)
    other = attention(*qkv, causal=False, mask=lambda b, h, i, j: block_rule(b, h, i, j) | (j == 0))
    assert not torch.equal(one, other)


def test_flash_attn_package_v2_is_called_with_its_own_arguments(monkeypatch):
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
        assert q.shape[-1] % 8 == 0 and window_size == (3, -1)
        return naive_attention(q, k, v, causal=causal, scale=softmax_scale, window=window_size,
                               alibi_slopes=alibi_slopes)  # fmt: skip

    _install_flash_attn(monkeypatch, flash_attn_func=flash_attn_func)
    *qkv, _ = make_qkv(2, 9, 4, 2, 5)
    slopes = torch.rand(4)
    arguments = dict(causal=True, window=4, alibi_slopes=slopes)
    output = SequenceParallelAttention(implementation="flash_attn")(*qkv, **arguments)
    torch.testing.assert_close(output, naive_attention(*qkv, **arguments))


def test_flash_attn_package_v1_is_called_with_its_own_arguments(monkeypatch):
    # fmt: off
    def flash_attn_unpadded_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                 softmax_scale=None, causal=False, return_attn_probs=False, deterministic=False):
        # fmt: on
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist() == [0, 9, 18] and cu_seqlens_q.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k, dropout_p) == (9, 9, 0.0) and q.shape == k.shape == (18, 4, 8)
        output = naive_attention(*(x.unflatten(0, (2, 9)) for x in (q, k, v)), causal=causal, scale=softmax_scale)
        return output.flatten(0, 1)

    _install_flash_attn(monkeypatch, flash_attn_unpadded_func=flash_attn_unpadded_func)
    *qkv, _ = make_qkv(2, 9, 4, 2, 5)
    output = SequenceParallelAttention(implementation="flash_attn")(*qkv, causal=True)
    torch.testing.assert_close(output, naive_attention(*qkv, causal=True))
    with pytest.raises(NotImplementedError, match='"flash_attn" does not support alibi; "tiled" does'):
        SequenceParallelAttention(implementation="flash_attn")(*qkv, alibi_slopes=torch.rand(4))


def test_only_attention_that_is_an_operation_can_be_kept(monkeypatch):
    reason = local_attention.unkept_reason
    assert [name for name in local_attention.IMPLEMENTATIONS if reason(name)] == ["math", "flex"]
    _install_flash_attn(monkeypatch, flash_attn_unpadded_func=None)
    assert "the installed flash_attn registers no operation of torch" in reason("flash_attn")
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define("_flash_attn_forward(Tensor q) -> Tensor")
        assert reason("flash_attn") is None
    assert reason("flash_attn")


def _install_flash_attn(monkeypatch, **functions):
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    vars(interface).update(functions)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"mask must be \[B\|1, H\|1, rows, S\] = \[2\|1, 4\|1, 1\|6, 6\], got \[2, 4, 6, 5\]",
         dict(mask=torch.ones(2, 4, 6, 5, dtype=torch.bool))),
        (ValueError, "mask must be bool .* got torch.int64", dict(mask=torch.ones(2, 4, 6, 6, dtype=torch.int64))),
        (NotImplementedError, "mask requires a gradient", dict(mask=torch.ones(2, 4, 6, 6, requires_grad=True))),
        (NotImplementedError, "alibi_slopes require a gradient", dict(alibi_slopes=torch.ones(4, requires_grad=True))),
        (ValueError, r"alibi_slopes must be \[H\] = \[4\], got \[3\]", dict(alibi_slopes=torch.ones(3))),
        (ValueError, "window must be at least 1 token, got 0", dict(window=0)),
        (ValueError, r"window must be a number of tokens or \(left, right\) .* got \(1, -2\)", dict(window=(1, -2))),
        (ValueError, r"document_ids must be \[B, L\] = \[2, 6\] .* got \[6\]", dict(document_ids=torch.zeros(6))),
        (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", dict(dropout_p=1.0)),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(error, message, arguments):
    *qkv, _ = make_qkv(2, 6, 4, 2, 4)
    with pytest.raises(error, match=message):
        SequenceParallelAttention()(*qkv, **arguments)


def test_bad_tensors_are_named():
    q, k, v, _ = make_qkv(2, 6, 4, 3, 4)
    with pytest.raises(ValueError, match="multiple of key/value heads, got 4 and 3"):
        SequenceParallelAttention()(q, k, v)
    with pytest.raises(ValueError, match=r"q must be \[B, L, H, D\] and k, v .* got \[2, 6, 4, 4\], \[2, 5, 3, 4\]"):
        SequenceParallelAttention()(q, k[:, 1:], v)
    with pytest.raises(ValueError, match="one dtype, got torch.float32, torch.float64"):
        SequenceParallelAttention()(q, q.double(), q)


@pytest.mark.parametrize(
    ("implementation", "arguments", "message"),
    [
        ("flash", dict(window=3), '"flash" does not support window; "tiled" does'),
        ("cudnn", dict(alibi_slopes=torch.ones(4)), '"cudnn" does not support alibi'),
        ("flex", dict(mask=torch.zeros(1, 1, 6, 6), dropout_p=0.1), '"flex" does not support dropout, float mask'),
        ("efficient", dict(dropout_p=0.1), '"efficient" does not support dropout'),
        ("flash_attn", dict(), "flash_attn cannot be imported"),
    ],
)
def test_an_implementation_that_cannot_is_refused(implementation, arguments, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    *qkv, _ = make_qkv(2, 6, 4, 2, 4)
    with pytest.raises(NotImplementedError, match=message):
        SequenceParallelAttention(implementation=implementation)(*qkv, **arguments)


def test_unknown_implementation_and_mode():
    with pytest.raises(ValueError, match="implementation must be one of auto, tiled, .* got 'fast'"):
        SequenceParallelAttention(implementation="fast")
    with pytest.raises(ValueError, match="got 'megatron'"):
        SequenceParallelAttention(mode="megatron")

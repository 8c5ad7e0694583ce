# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's signature: its own call, the call sites of OpenFold and its relatives, and every error message."""

import re

import pytest
import torch

from deepspeed_ds4sci.compat import DS4Sci_EvoformerAttention
from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention
from tests.helpers.inputs import make_inputs
from tests.helpers.shapes import AttentionShape

SHAPE = AttentionShape("compat", 2, 3, 6, 6, 4, 8, "DeepSpeed's axes: batch, rows, length, heads, width")
FP64 = torch.float64


def openfold_attention(q, k, v, biases):
    """What OpenFold computes without the op: q [*, H, Q, D] scaled, k, v [*, H, K, D], biases [*, H|1, Q|1, K]."""
    logits = q @ k.transpose(-1, -2)
    for bias in biases:
        logits = logits + bias
    return torch.softmax(logits, dim=-1) @ v


def assert_equal_to_openfold(Q, K, V, biases, tolerance=1e-12):
    """Value and all gradients of the call against OpenFold's own formula on the same tensors."""
    leaves = [x for x in (Q, K, V, *biases) if x is not None and x.requires_grad]
    o = DS4Sci_EvoformerAttention(Q, K, V, biases)
    q, k, v = (x.transpose(-2, -3) for x in (Q, K, V))
    expected = openfold_attention(q * Q.shape[-1] ** -0.5, k, v, [b for b in biases if b is not None]).transpose(
        -2, -3
    )
    torch.testing.assert_close(o, expected, rtol=tolerance, atol=tolerance)
    assert o.is_contiguous()
    do = torch.randn(o.shape, dtype=o.dtype)
    for got, want in zip(torch.autograd.grad(o, leaves, do), torch.autograd.grad(expected, leaves, do), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def leaf(*sizes, dtype=FP64):
    return torch.randn(*sizes, dtype=dtype, requires_grad=True)


def test_deepspeeds_own_call():
    inputs = make_inputs(SHAPE)
    o = DS4Sci_EvoformerAttention(inputs.q, inputs.k, inputs.v, [inputs.mask_bias, inputs.pair_bias])
    expected = evoformer_attention(
        inputs.q, inputs.k, inputs.v, mask_bias=inputs.mask_bias, pair_bias=inputs.pair_bias
    )
    assert torch.equal(o, expected)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("none", [True, False])
def test_missing_biases_add_nothing_and_the_list_stays_as_it_is(count, none):
    inputs = make_inputs(SHAPE)
    given = [None, None][:count] if none else [inputs.mask_bias, inputs.pair_bias][:count]
    before = list(given)
    o = DS4Sci_EvoformerAttention(inputs.q, inputs.k, inputs.v, given)
    assert len(given) == len(before) and all(x is y for x, y in zip(given, before, strict=True))
    named = dict(zip(("mask_bias", "pair_bias"), before, strict=False))
    assert torch.equal(o, evoformer_attention(inputs.q, inputs.k, inputs.v, **named))


def test_the_pair_bias_alone():
    inputs = make_inputs(SHAPE)
    o = DS4Sci_EvoformerAttention(inputs.q, inputs.k, inputs.v, (None, inputs.pair_bias))
    assert torch.equal(o, evoformer_attention(inputs.q, inputs.k, inputs.v, pair_bias=inputs.pair_bias))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 3, 2), (1, 2, 1, 3)])
def test_any_number_of_leading_axes(lead):
    q, k, v = leaf(*lead, 5, 2, 4), leaf(*lead, 7, 2, 4), leaf(*lead, 7, 2, 4)
    assert_equal_to_openfold(q, k, v, [leaf(*lead, 1, 1, 7), leaf(*lead, 2, 5, 7)])


@pytest.mark.parametrize(
    "mask_lead, pair_lead",
    [
        ((2, 3, 2), (2, 1, 1)),
        ((2, 1, 2), (1, 3, 1)),
        ((1, 1, 1), (1, 1, 1)),
        ((1, 3, 1), (2, 3, 1)),
        ((), ()),
        ((2,), (1, 2)),
        ((3, 1), (3, 2)),
        ((2, 3, 2), (1, 1, 2)),
        ((1, 1, 2), (2, 1, 2)),
    ],
)
def test_biases_that_broadcast_over_leading_axes(mask_lead, pair_lead):
    q, k, v = leaf(2, 3, 2, 5, 2, 4), leaf(2, 3, 2, 7, 2, 4), leaf(2, 3, 2, 7, 2, 4)
    assert_equal_to_openfold(q, k, v, [leaf(*mask_lead, 1, 1, 7), leaf(*pair_lead, 2, 5, 7)])


@pytest.mark.parametrize(
    "pair_lead, expanded",
    [((2, 1, 1), (2, 3, 2)), ((1, 3, 1), (2, 3, 2)), ((1, 1, 1), (2, 1, 2)), ((1, 1, 2), (1, 3, 2))],
)
def test_views_expanded_over_leading_axes(pair_lead, expanded):
    q, k, v = leaf(2, 3, 2, 5, 2, 4), leaf(2, 3, 2, 7, 2, 4), leaf(2, 3, 2, 7, 2, 4)
    base = leaf(*pair_lead, 2, 5, 7)
    given = base.expand(*expanded, 2, 5, 7)
    o, plain = (DS4Sci_EvoformerAttention(q, k, v, [None, pair]) for pair in (given, base))
    assert torch.equal(o, plain)
    do = torch.randn_like(o)
    torch.testing.assert_close(torch.autograd.grad(o, base, do), torch.autograd.grad(plain, base, do))


def test_no_copy_of_q_for_two_leading_axes(monkeypatch):
    seen = []

    def attend(q, k, v, **biases):
        seen.extend((q, k, v, *biases.values()))
        return q

    monkeypatch.setattr("deepspeed_ds4sci.compat.evoformer_attention", attend)
    inputs = make_inputs(AttentionShape("square", 2, 6, 6, 6, 4, 8, ""), layout="ending_node", pair="transposed")
    DS4Sci_EvoformerAttention(inputs.q, inputs.k, inputs.v, [inputs.mask_bias, inputs.pair_bias])
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in inputs.tensors()[:5]]


class TestOpenFold:
    """The steps of its attention module around the call."""

    batch, n, heads, width = 2, 6, 4, 8

    @pytest.fixture
    def projections(self):
        """q, k, v [*, H, L, D] as its attention module makes them: transposed views of a projection [*, L, H, D]."""
        make = [leaf(self.batch, self.n, self.n, self.heads, self.width) for _ in range(3)]
        return [x.transpose(-2, -3) for x in make]

    def test_starting_node(self, projections):
        q, k, v = (x.transpose(-2, -3) for x in projections)
        z_bias = leaf(self.batch, self.n, self.n, self.heads)
        mask = leaf(self.batch, self.n, self.n)[..., :, None, None, :]
        assert_equal_to_openfold(q, k, v, [mask, z_bias.permute(0, 3, 1, 2).unsqueeze(-4)])

    def test_ending_node(self, projections):
        q, k, v = (x.transpose(-2, -3).transpose(1, 2) for x in projections)
        z_bias = leaf(self.batch, self.n, self.n, self.heads).transpose(1, 2)
        mask = leaf(self.batch, self.n, self.n).transpose(1, 2)[..., :, None, None, :]
        assert_equal_to_openfold(q, k, v, [mask, z_bias.permute(0, 3, 1, 2).unsqueeze(-4)])

    @pytest.mark.parametrize("chunk", [1, 4, 6])
    def test_chunks_with_an_expanded_pair_bias(self, projections, chunk):
        """Batch 1: its chunking flattens the leading axes, repeats the biases over them, and cuts pieces of rows."""
        q, k, v = (x[:1].transpose(-2, -3).flatten(0, 1) for x in projections)
        mask, pair = leaf(1, self.n, 1, 1, self.n), leaf(1, 1, self.heads, self.n, self.n)
        flat_mask = mask.flatten(0, 1)
        flat_pair = pair.expand(-1, self.n, -1, -1, -1).flatten(0, 1)
        pieces = []
        for start in range(0, self.n, chunk):
            part = slice(start, start + chunk)
            piece = [x[part].unsqueeze(0) for x in (q, k, v, flat_mask, flat_pair)]
            pieces.append(DS4Sci_EvoformerAttention(*piece[:3], piece[3:]).squeeze(0))
        o = torch.cat(pieces)
        whole = DS4Sci_EvoformerAttention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), [mask, pair])[0]
        torch.testing.assert_close(o, whole)
        do = torch.randn_like(o)
        for got, want in zip(
            torch.autograd.grad(o, (mask, pair), do), torch.autograd.grad(whole, (mask, pair), do), strict=True
        ):
            torch.testing.assert_close(got, want)

    def test_one_sequence_without_a_batch_axis(self):
        q, k, v = (leaf(self.n, self.n, self.heads, self.width) for _ in range(3))
        assert_equal_to_openfold(q, k, v, [leaf(self.n, 1, 1, self.n), leaf(1, self.heads, self.n, self.n)])

    def test_samples_that_share_their_pair_bias(self):
        """Diffusion: [batch, samples, L, H, D] with one bias for all samples."""
        q, k, v = (leaf(self.batch, 5, self.n, self.heads, self.width) for _ in range(3))
        assert_equal_to_openfold(
            q, k, v, [leaf(self.batch, 1, 1, 1, self.n), leaf(self.batch, 1, self.heads, self.n, self.n)]
        )


@pytest.mark.parametrize(
    "q_dtype, bias_dtype",
    [
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, FP64),
    ],
)
def test_a_bias_of_another_float_dtype_is_taken_in_fp32(q_dtype, bias_dtype):
    inputs = make_inputs(SHAPE, q_dtype)
    biases = [x.detach().to(bias_dtype).requires_grad_() for x in (inputs.mask_bias, inputs.pair_bias)]
    o = DS4Sci_EvoformerAttention(inputs.q, inputs.k, inputs.v, biases)
    expected = evoformer_attention(
        inputs.q, inputs.k, inputs.v, mask_bias=biases[0].float(), pair_bias=biases[1].float()
    )
    assert torch.equal(o, expected)
    assert o.dtype == q_dtype
    assert {grad.dtype for grad in torch.autograd.grad(o, biases, inputs.do)} == {bias_dtype}


def test_a_boolean_mask():
    inputs = make_inputs(SHAPE, mask="bool")
    o = DS4Sci_EvoformerAttention(inputs.q, inputs.k, inputs.v, [inputs.mask_bias])
    assert torch.equal(o, evoformer_attention(inputs.q, inputs.k, inputs.v, mask_bias=inputs.mask_bias))


def test_autocast():
    inputs = make_inputs(SHAPE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = DS4Sci_EvoformerAttention(inputs.q, inputs.k, inputs.v, [inputs.mask_bias, inputs.pair_bias])
    assert o.dtype == torch.bfloat16


def test_compile_without_graph_breaks():
    inputs = make_inputs(SHAPE)
    *tensors, _ = inputs.tensors()

    def model(q, k, v, mask_bias, pair_bias):
        return DS4Sci_EvoformerAttention(q, k, v, [mask_bias, pair_bias])

    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(*tensors), model(*tensors))


def zeros(*sizes, dtype=torch.float32, device="cpu"):
    return torch.zeros(sizes, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"Q": None}, "Q must be a torch.Tensor, got NoneType"),
        ({"V": [1]}, "V must be a torch.Tensor, got list"),
        ({"Q": zeros(6, 4)}, "Q must be [*, L, H, D], got [6, 4]"),
        ({"K": zeros(2, 2, 6, 4, 8)}, "K must have the leading axes of Q = [2, 3], got [2, 2]"),
        ({"V": zeros(3, 6, 4, 8)}, "V must have the leading axes of Q = [2, 3], got [3]"),
        ({"K": zeros(2, 3, 6, 2, 8)}, "k must be [B, N, Lk, H, D] = [2, 3, Lk, 4, 8], got [2, 3, 6, 2, 8]"),
        ({"biases": [None, None, None]}, "biases must hold at most 2 tensors, got 3"),
        ({"biases": [3]}, "biases[0] must be a torch.Tensor or None, got int"),
        ({"biases": [None, "x"]}, "biases[1] must be a torch.Tensor or None, got str"),
        (
            {"biases": [zeros(2, 3, 1, 1, 5)]},
            "biases[0] must be [*, 1, 1, Lk] = [2, 3, 1, 1, 6], all but the last two of which "
            "may be 1; got [2, 3, 1, 1, 5]",
        ),
        (
            {"biases": [zeros(2, 3, 4, 1, 6)]},
            "biases[0] must be [*, 1, 1, Lk] = [2, 3, 1, 1, 6], all but the last two of which "
            "may be 1; got [2, 3, 4, 1, 6]",
        ),
        (
            {"biases": [zeros(6)]},
            "biases[0] must be [*, 1, 1, Lk] = [2, 3, 1, 1, 6], all but the last two of which may be 1; got [6]",
        ),
        (
            {"biases": [None, zeros(2, 2, 4, 6, 6)]},
            "biases[1] must be [*, H, Lq, Lk] = [2, 3, 4, 6, 6], all but the last two of "
            "which may be 1; got [2, 2, 4, 6, 6]",
        ),
        (
            {"biases": [None, zeros(1, 2, 1, 4, 6, 6)]},
            "biases[1] must be [*, H, Lq, Lk] = [2, 3, 4, 6, 6], all but the last two "
            "of which may be 1; got [1, 2, 1, 4, 6, 6]",
        ),
        (
            {"biases": [zeros(2, 3, 1, 1, 6, dtype=torch.int64)]},
            "biases[0] must have a float dtype or be boolean, got torch.int64",
        ),
        (
            {"biases": [None, zeros(2, 1, 4, 6, 6, dtype=torch.bool)]},
            "biases[1] must have a float dtype, got torch.bool",
        ),
        ({"biases": [zeros(2, 3, 1, 1, 6, device="meta")]}, "biases[0] must be on the device of Q = cpu, got meta"),
    ],
)
def test_wrong_arguments(changes, message):
    given = {"Q": zeros(2, 3, 6, 4, 8), "K": zeros(2, 3, 6, 4, 8), "V": zeros(2, 3, 6, 4, 8), "biases": []} | changes
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DS4Sci_EvoformerAttention(**given)

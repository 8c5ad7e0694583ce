# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: against a loop over single numbers, numerical derivatives, and the rules for dropped keys."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention
from deepspeed_ds4sci.ops.reference import attention_and_lse, evoformer_attention_reference, reference_gradients
from tests.helpers.inputs import make_inputs
from tests.helpers.numerics import run
from tests.helpers.shapes import AttentionShape

SMALL = AttentionShape("small", 2, 2, 2, 3, 2, 2, "fits numerical derivatives")
TINY = AttentionShape("tiny", 2, 2, 2, 3, 1, 2, "fits second numerical derivatives")
FP64 = torch.float64


def attention_by_loops(q, k, v, mask_bias, pair_bias, scale):
    """The formula one number at a time."""
    o = torch.zeros_like(q)
    batch, rows, q_len, heads, _ = q.shape
    for b, n, i, h in (
        (b, n, i, h) for b in range(batch) for n in range(rows) for i in range(q_len) for h in range(heads)
    ):
        weights = []
        for j in range(k.shape[2]):
            logit = scale * sum((q[b, n, i, h] * k[b, n, j, h]).tolist())
            logit += mask_bias[b, n, 0, 0, j].item() + pair_bias[b, 0, h, i, j].item()
            weights.append(math.exp(logit))
        for j, weight in enumerate(weights):
            o[b, n, i, h] += weight / sum(weights) * v[b, n, j, h]
    return o


def test_equals_the_formula_one_number_at_a_time():
    inputs = make_inputs(SMALL, FP64)
    with torch.no_grad():
        expected = attention_by_loops(*inputs.tensors()[:5], 0.7)
    torch.testing.assert_close(attention_and_lse(*inputs.tensors(), 0.7)[0].detach(), expected)
    inputs.gate = torch.randn(inputs.q.shape, dtype=FP64)
    gated = expected / (1 + torch.exp(-inputs.gate))
    torch.testing.assert_close(attention_and_lse(*inputs.tensors(), 0.7)[0].detach(), gated)


def test_lse_is_the_log_of_the_softmax_sum():
    inputs = make_inputs(SMALL, FP64)
    _, lse = attention_and_lse(*inputs.tensors(), 0.5)
    logits = 0.5 * torch.einsum("bnqhd,bnkhd->bnhqk", inputs.q, inputs.k) + inputs.mask_bias + inputs.pair_bias
    torch.testing.assert_close(lse, torch.logsumexp(logits, dim=-1))


def _through_the_op(inputs):
    """(function of the differentiable inputs, these inputs): the op's reference implementation."""
    given = inputs.differentiable()

    def attend(*tensors):
        arguments = inputs.named() | dict(zip(given, tensors, strict=True))
        return evoformer_attention(**arguments, implementation="reference")

    return attend, tuple(given.values())


@pytest.mark.parametrize("mask", ["none", "additive", "bool", "all_masked", "minus_inf", "shared"])
@pytest.mark.parametrize("pair", ["none", "contiguous", "shared_samples", "one_head"])
def test_first_derivatives_equal_numerical_ones(mask, pair):
    gate = "contiguous" if pair == "contiguous" else None
    inputs = make_inputs(SMALL, FP64, mask=mask, pair=pair, gate=gate)
    if mask in ("all_masked", "minus_inf"):  # a numerical derivative cannot step away from -inf
        inputs.mask_bias.requires_grad_(False)
    assert gradcheck(*_through_the_op(inputs))


@pytest.mark.parametrize(
    "mask, pair, gate",
    [
        ("none", "none", None),
        ("none", "none", "contiguous"),
        ("additive", "contiguous", None),
        ("additive", "contiguous", "contiguous"),
        ("bool", "one_head", None),
        ("shared", "shared_samples", None),
    ],
)
def test_second_derivatives_equal_numerical_ones(mask, pair, gate):
    assert gradgradcheck(*_through_the_op(make_inputs(TINY, FP64, mask=mask, pair=pair, gate=gate)))


def test_second_derivatives_of_a_row_without_keys_are_zero():
    inputs = make_inputs(SMALL, FP64, mask="all_masked")
    o = evoformer_attention(inputs.q, inputs.k, inputs.v, mask_bias=inputs.mask_bias, pair_bias=inputs.pair_bias)
    dq, dk = torch.autograd.grad(o, (inputs.q, inputs.k), inputs.do, create_graph=True)
    second = torch.autograd.grad(dq.square().sum() + dk.square().sum(), list(inputs.differentiable().values()))
    assert all(torch.isfinite(x).all() for x in second)
    assert all(torch.count_nonzero(x[:, ::2]) == 0 for x in second[:4])
    assert all(torch.count_nonzero(x[:, 1::2]) > 0 for x in second[:4])


def test_written_out_gradients_equal_autograd():
    inputs = make_inputs(SMALL, FP64, mask="additive", pair="one_head", gate="contiguous")
    expected = run(evoformer_attention_reference, inputs)
    scale = SMALL.head_dim**-0.5
    with torch.no_grad():
        actual = reference_gradients(inputs.do, inputs.tensors(), scale, (True,) * 6)
    for name, grad in zip(("dq", "dk", "dv", "dmask_bias", "dpair_bias", "dgate"), actual, strict=True):
        torch.testing.assert_close(grad, expected[name])


def test_one_tensor_as_q_k_and_v_gets_three_second_gradients():
    x = torch.randn(1, 1, 3, 1, 2, dtype=FP64, requires_grad=True)
    assert gradgradcheck(lambda x: evoformer_attention(x, x, x, implementation="reference"), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, FP64])
def test_output_has_the_dtype_of_q_and_is_contiguous(dtype):
    o, lse = attention_and_lse(*make_inputs(SMALL, dtype).tensors(), 1.0)
    assert (o.dtype, lse.dtype) == (dtype, FP64 if dtype == FP64 else torch.float32)
    assert o.is_contiguous()


@pytest.mark.parametrize("implementation", ["reference", "tiled"])
class TestDroppedKeys:
    """The rules that every implementation follows."""

    shape = AttentionShape("dropped", 1, 3, 5, 6, 2, 4, "rules for dropped keys")

    def results(self, inputs, implementation):
        return run(evoformer_attention, inputs, implementation=implementation)

    def test_boolean_mask_equals_minus_infinity(self, implementation):
        additive = make_inputs(self.shape, mask="minus_inf")
        boolean = make_inputs(self.shape, mask="minus_inf")
        boolean.mask_bias = boolean.mask_bias.detach() == 0
        expected, actual = self.results(additive, implementation), self.results(boolean, implementation)
        for name, tensor in actual.tensors.items():
            assert torch.equal(tensor, expected[name]), name

    def test_a_dropped_key_has_no_influence_however_large_it_is(self, implementation):
        plain, wild = make_inputs(self.shape, mask="minus_inf"), make_inputs(self.shape, mask="minus_inf")
        dropped = (wild.mask_bias == float("-inf"))[:, :, 0, 0]
        with torch.no_grad():
            wild.k[dropped] = 1e15
            wild.v[dropped] = 1e15
        expected, actual = self.results(plain, implementation), self.results(wild, implementation)
        torch.testing.assert_close(actual["o"], expected["o"])
        for name in ("dq", "dk", "dv", "dmask_bias", "dpair_bias"):
            assert torch.isfinite(actual[name]).all(), name
        assert torch.count_nonzero(actual["dk"][dropped]) == torch.count_nonzero(actual["dv"][dropped]) == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_row_without_keys_gives_zero_and_zero_gradients(self, implementation, dtype):
        results = self.results(make_inputs(self.shape, dtype, mask="all_masked"), implementation)
        for name in ("o", "dq", "dk", "dv", "dmask_bias"):
            assert torch.count_nonzero(results[name][:, ::2]) == 0, name
            assert torch.count_nonzero(results[name][:, 1::2]) > 0, name
        assert torch.isfinite(results["dpair_bias"]).all()

    def test_mask_and_pair_bias_that_drop_complementary_halves(self, implementation):
        inputs = make_inputs(self.shape)
        with torch.no_grad():
            inputs.mask_bias[..., ::2] = float("-inf")
            inputs.pair_bias[..., 1::2] = float("-inf")
        for name, tensor in self.results(inputs, implementation).tensors.items():
            assert torch.count_nonzero(tensor) == 0, name  # NaN counts as nonzero

    def test_a_query_that_may_look_nowhere(self, implementation):
        results = self.results(make_inputs(self.shape, pair="minus_inf"), implementation)
        assert torch.count_nonzero(results["o"][:, :, 0]) == torch.count_nonzero(results["dq"][:, :, 0]) == 0
        assert all(torch.isfinite(x).all() for x in results.tensors.values())

    @pytest.mark.parametrize("value", [-1e9, -3e38])
    def test_a_row_of_equal_large_negatives_is_the_softmax_of_the_rest(self, implementation, value):
        plain, low = make_inputs(self.shape), make_inputs(self.shape)
        with torch.no_grad():
            for inputs in (plain, low):
                inputs.mask_bias[:, 1] = 0.0
                inputs.pair_bias[..., 3, :] = 0.0
            low.mask_bias[:, 1] = value
            low.pair_bias[..., 3, :] = value
        expected, actual = self.results(plain, implementation), self.results(low, implementation)
        for name, tensor in actual.tensors.items():
            torch.testing.assert_close(tensor, expected[name], msg=name)

    def test_large_negatives_on_some_keys_drop_them(self, implementation):
        dropped, low = make_inputs(self.shape, mask="minus_inf"), make_inputs(self.shape, mask="minus_inf")
        with torch.no_grad():
            low.mask_bias[low.mask_bias == float("-inf")] = -1e9
        expected, actual = self.results(dropped, implementation), self.results(low, implementation)
        for name, tensor in actual.tensors.items():
            torch.testing.assert_close(tensor, expected[name], msg=name)

    def test_complementary_large_negatives_stay_finite(self, implementation):
        inputs = make_inputs(self.shape)
        with torch.no_grad():
            inputs.mask_bias[..., ::2] = -1e10
            inputs.pair_bias[..., 1::2] = -1e10
        results = self.results(inputs, implementation)
        assert all(torch.isfinite(x).all() for x in results.tensors.values())
        assert results["o"].abs().max() <= inputs.v.abs().max()

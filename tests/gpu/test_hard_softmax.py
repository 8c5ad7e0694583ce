# SPDX-License-Identifier: Apache-2.0
"""Inputs that defeat a softmax with an unlucky reference: the largest logit of a row is not where one would guess it.

Shapes have rows and queries that share a work item with well-behaved ones, which must not suffer either.
"""

import dataclasses

import pytest
import torch

from deepspeed_ds4sci import evoformer_attention
from tests.helpers import shapes
from tests.helpers.inputs import make_inputs
from tests.helpers.numerics import (
    assert_no_worse_than_eager,
    check_against_eager,
    eager_results,
    fp64_reference,
    run_op,
)

from .runs import RUNS, RUNS_16_BIT, with_masked_maximum

pytestmark = pytest.mark.gpu

SMALL = shapes.AttentionShape("small", 2, 5, 72, 200, 3, 32, "tails on every axis")
MINUS_INF = float("-inf")


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("spread", (4.0, 8.0, 20.0), ids=("logits-100", "logits-300", "logits-2000"))
def test_large_logits(spread, implementation, dtype):
    check_against_eager(make_inputs(SMALL, dtype, "cuda", spread=spread), implementation)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("logit", (200.0, 1e4))
def test_logits_of_both_signs(logit, implementation, dtype):
    """Every query has keys at +logit and at -logit through q and k alone; some queries have only the latter."""
    inputs = make_inputs(SMALL, dtype, "cuda")
    with torch.no_grad():
        size = (logit * SMALL.head_dim**-0.5) ** 0.5  # of every element, so that the scaled product is +-logit
        sign = torch.where(torch.arange(SMALL.k_len, device="cuda") % 3 == 0, 1.0, -1.0)
        inputs.q.fill_(size)
        inputs.k.copy_((size * sign)[:, None, None].expand_as(inputs.k))
        inputs.mask_bias[:, 1, ..., ::3] = MINUS_INF  # row 1 keeps none of the large ones
    actual, reference, eager = run_op(inputs, implementation), fp64_reference(inputs), eager_results(inputs)
    for name in ("o", "dv"):
        assert_no_worse_than_eager(name, actual[name], eager[name], reference[name])
    for name, tensor in actual.tensors.items():
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize(("implementation", "dtype"), RUNS_16_BIT)
@pytest.mark.parametrize("value", (60.0, 200.0, 1e4))
def test_the_largest_of_the_pair_bias_is_masked(value, implementation, dtype):
    """A row's reference is its largest pair bias; here the mask drops that key in some rows and all others lie far
    below it."""
    inputs = with_masked_maximum(SMALL, value, dtype)
    # Rows where the key is dropped, against the same rows of a problem without it.
    plain = make_inputs(SMALL, dtype, "cuda", mask="minus_inf")
    with torch.no_grad():
        plain.pair_bias[..., 77] = 0.0
        plain.mask_bias[..., 77] = MINUS_INF
    actual, expected = run_op(inputs, implementation), run_op(plain, implementation)
    for name in ("o", "dq", "dk", "dv", "dmask_bias"):
        assert_close(name, actual[name][:, ::2], expected[name][:, ::2])
    for name, tensor in actual.tensors.items():
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize(("implementation", "dtype"), RUNS_16_BIT)
@pytest.mark.parametrize(
    ("q_len", "k_len"), ((300, 200), (1100, 3000)), ids=("heads-before-rows", "rows-before-heads")
)
@pytest.mark.parametrize("head_dim", (16, 32, 64))
def test_one_unlucky_query_anywhere(head_dim, q_len, k_len, implementation, dtype):
    """Only its own work item is computed again, which the kernel that finds it counts by other numbers of rows. The
    larger pair bias is beyond what work items go through with heads first."""
    batch, rows, heads, logit, scale = 2, 7, 5, 300.0, head_dim**-0.5
    shape = shapes.AttentionShape(
        "unlucky", batch, rows, q_len, k_len, heads, head_dim, "more items than one of each axis"
    )
    plain = make_inputs(shape, dtype, "cuda", mask="minus_inf")
    with torch.no_grad():
        plain.mask_bias[..., 77] = 0.0
    expected = op(plain, implementation)
    for row in range(rows):
        sample, query, head = row % batch, (row * 97 + 40) % q_len, row % heads
        q = plain.q.detach().clone()
        key = plain.k[sample, row, 77, head].detach().float()
        q[sample, row, query, head] = (key * logit / (scale * key.square().sum())).to(dtype)
        actual = op(plain, implementation, q)
        logits = scale * (q[sample, row, query, head].double() @ plain.k[sample, row, :, head].double().T)
        logits += plain.mask_bias[sample, row, 0, 0].double() + plain.pair_bias[sample, 0, head, query].double()
        value = logits.softmax(-1) @ plain.v[sample, row, :, head].double()
        assert logits.max() > 0.8 * logit
        eps = torch.finfo(dtype).eps
        assert (actual[sample, row, query, head].double() - value).abs().max() <= 2 * eps * value.abs().max()
        # Others of its work item, of up to 3 rows and 128 queries, are computed by another softmax, too.
        may_differ = torch.zeros(actual.shape[:-1], dtype=torch.bool, device="cuda")
        may_differ[sample, max(row - 2, 0) : row + 3, query // 128 * 128 : query // 128 * 128 + 128, head] = True
        assert torch.equal(actual[~may_differ], expected[~may_differ])
        actual[sample, row, query, head] = expected[sample, row, query, head]
        assert (actual.float() - expected.float()).abs().max() <= 4 * eps * plain.v.detach().abs().max()


def op(inputs, implementation, q=None):
    with torch.no_grad():
        return evoformer_attention(
            inputs.q if q is None else q,
            inputs.k,
            inputs.v,
            mask_bias=inputs.mask_bias,
            pair_bias=inputs.pair_bias,
            implementation=implementation,
        )


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
def test_twenty_runs_of_unlucky_rows_give_the_same_bits(implementation, dtype):
    inputs = with_masked_maximum(SMALL, 200.0, dtype)
    first = run_op(inputs, implementation)
    for _ in range(19):
        again = run_op(inputs, implementation)
        for name, tensor in first.tensors.items():
            assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(("implementation", "dtype"), RUNS_16_BIT)
def test_a_cuda_graph_captured_with_lucky_rows_replays_unlucky_ones(implementation, dtype):
    inputs, unlucky = make_inputs(SMALL, dtype, "cuda"), with_masked_maximum(SMALL, 200.0, dtype, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_op(inputs, implementation)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_op(inputs, implementation)
    for old, new in zip((*inputs.tensors()[:5], inputs.do), (*unlucky.tensors()[:5], unlucky.do), strict=True):
        old.data.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for name, tensor in run_op(unlucky, implementation).tensors.items():
        assert torch.equal(captured[name], tensor), name


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("through", ("pair_bias", "k"))
@pytest.mark.parametrize("gate", (None, "contiguous"))
def test_one_dominating_key(gate, through, implementation, dtype):
    """The key's weight is 1 and its logit far above the rest."""
    inputs = make_inputs(SMALL, dtype, "cuda", gate=gate)
    with torch.no_grad():
        if through == "pair_bias":
            inputs.pair_bias[..., 77] = 120.0
            inputs.pair_bias[..., :64] = -200.0
        else:
            inputs.q.abs_()
            inputs.k[:, :, 77] = 50.0
    actual, reference, eager = run_op(inputs, implementation), fp64_reference(inputs), eager_results(inputs)
    for name in ("o", "dv") if gate is None else ("o", "dv", "dgate"):
        assert_no_worse_than_eager(name, actual[name], eager[name], reference[name])
    # What is left of the other gradients is the rounding of dP - delta, two equal numbers of the size of |do| |v|,
    # times what it is multiplied with and summed over.
    unit = inputs.do.norm(dim=-1).max().item() * inputs.v.detach().norm(dim=-1).max().item() * torch.finfo(dtype).eps
    largest = max(1.0, inputs.k.detach().abs().max().item() * SMALL.head_dim**-0.5)
    for name in ("dq", "dk", "dmask_bias", "dpair_bias"):
        assert actual[name].abs().max().item() <= 8 * unit * largest, name


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("keys", (1, 2, 3, 128, 200))
@pytest.mark.parametrize("head_dim", (16, 32, 64))
@pytest.mark.parametrize("pair", ("contiguous", "none"))
def test_equal_weights(pair, head_dim, keys, implementation, dtype):
    """Where all keys are one key, weights of 1 / 2^n have no rounding, and eager's dv has that of its output alone."""
    shape = dataclasses.replace(SMALL, rows=8, head_dim=head_dim)
    inputs = make_inputs(shape, dtype, "cuda", pair=pair, spread=2.0)
    with torch.no_grad():
        inputs.k.copy_(inputs.k[:, :, :1].expand_as(inputs.k))
        inputs.mask_bias.zero_()
        inputs.mask_bias[..., keys:] = MINUS_INF
        if inputs.pair_bias is not None:
            inputs.pair_bias.copy_(inputs.pair_bias[..., :1].expand_as(inputs.pair_bias))
    actual, reference, eager = run_op(inputs, implementation), fp64_reference(inputs), eager_results(inputs)
    for name in ("o", "dv"):
        assert_no_worse_than_eager(name, actual[name], eager[name], reference[name])


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("through", ("mask_bias", "pair_bias"))
def test_first_tiles_fully_masked(through, implementation, dtype):
    inputs = make_inputs(SMALL, dtype, "cuda")
    with torch.no_grad():
        getattr(inputs, through)[..., :130] = MINUS_INF
    check_against_eager(inputs, implementation)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("halves", ("interleaved", "contiguous"))
def test_complementary_masks_leave_zero_and_no_nan(halves, implementation, dtype):
    inputs = make_inputs(SMALL, dtype, "cuda")
    index = torch.arange(SMALL.k_len, device="cuda")
    first = index % 2 == 0 if halves == "interleaved" else index < SMALL.k_len // 2
    with torch.no_grad():
        inputs.mask_bias[..., first] = MINUS_INF
        inputs.pair_bias[..., ~first] = MINUS_INF
    for tensor in run_op(inputs, implementation).tensors.values():
        assert torch.count_nonzero(tensor) == 0  # NaN counts as nonzero


@pytest.mark.parametrize(("implementation", "dtype"), RUNS_16_BIT)
@pytest.mark.parametrize("mask", ("minus_inf", "all_masked"))
def test_minus_infinity_in_both_biases(mask, implementation, dtype):
    shape = dataclasses.replace(SMALL, q_len=200)
    check_against_eager(make_inputs(shape, dtype, "cuda", mask=mask, pair="minus_inf"), implementation)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS_16_BIT)
@pytest.mark.parametrize("k_len", (200, 192), ids=("tail", "whole-tiles"))
@pytest.mark.parametrize("value", (-1e4, -1e25, -1e38))
def test_large_negatives_beside_rows_without_keys(value, k_len, implementation, dtype):
    """A constant over all keys of a query changes nothing, and where the mask keeps no key the result is 0."""
    if value < torch.finfo(dtype).min:
        pytest.skip(f"{value:g} is -inf in {dtype}")
    shape = dataclasses.replace(SMALL, k_len=k_len)
    plain, shifted = (make_inputs(shape, dtype, "cuda", mask="all_masked") for _ in range(2))
    with torch.no_grad():
        plain.pair_bias[..., 3, :] = 0.0
        shifted.pair_bias[..., 3, :] = value
    expected, actual = run_op(plain, implementation), run_op(shifted, implementation)
    without_keys = (plain.mask_bias == MINUS_INF).all(-1).squeeze((-1, -2))
    assert without_keys.any() and torch.count_nonzero(actual["o"][without_keys]) == 0  # NaN counts as nonzero
    for name, tensor in expected.tensors.items():
        assert torch.isfinite(actual[name]).all(), name
        assert_close(name, actual[name], tensor)


def assert_close(name, actual, expected):
    """Equal but for a few roundings."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    assert error.item() <= 4 * torch.finfo(actual.dtype).eps, f"{name}: relative error {error.item():.1e}"


@pytest.mark.parametrize("also_unlucky", (False, True), ids=("alone", "beside-unlucky-rows"))
@pytest.mark.parametrize("value", (-1e4, -1e9, -3e9, -1e38))
@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
def test_rows_of_large_negatives_are_softmax_of_the_rest(implementation, dtype, value, also_unlucky):
    """A constant over all keys changes nothing, in either bias and however large; also where a neighbour has its
    largest pair bias dropped."""
    if value < torch.finfo(dtype).min:
        pytest.skip(f"{value:g} is -inf in {dtype}")
    plain, shifted = (make_inputs(SMALL, dtype, "cuda") for _ in range(2))
    with torch.no_grad():
        for inputs, constant in ((plain, 0.0), (shifted, value)):
            inputs.mask_bias[:, 1] = constant
            inputs.pair_bias[..., 3, :] = constant
            if also_unlucky:
                inputs.pair_bias[..., 5, 77] = 300.0
                inputs.mask_bias[:, 0, ..., 77] = MINUS_INF
    expected, actual = run_op(plain, implementation), run_op(shifted, implementation)
    for name, tensor in expected.tensors.items():
        if dtype == torch.float32:
            torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
        else:
            assert_close(name, actual[name], tensor)

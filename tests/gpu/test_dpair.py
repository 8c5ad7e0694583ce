# SPDX-License-Identifier: Apache-2.0
"""d(pair_bias) from factored sums, which takes 2^27 logits, and where those leave the range of fp32."""

import pytest
import torch

from tests.helpers.inputs import make_inputs
from tests.helpers.numerics import (
    assert_no_worse_than_eager,
    check_against_eager,
    eager_results,
    fp64_reference,
    run_op,
)
from tests.helpers.shapes import AttentionShape

from .runs import ON_HOPPER, launches, with_masked_maximum

pytestmark = [pytest.mark.gpu, ON_HOPPER]
BF16, FP16 = torch.bfloat16, torch.float16
HEADS = 4


def shape_of(head_dim, batch=1, rows=130, queries=500, keys=530):
    shape = AttentionShape("factored", batch, rows, queries, keys, HEADS, head_dim, "tails of queries and keys")
    assert shape.logits >= 1 << 27
    return shape


def check(inputs):
    """Two launches of the kernel of d(pair_bias): its sums are factored."""
    assert launches(inputs, "bwd_dpair") == 2, "the shape no longer reaches factored sums"
    check_against_eager(inputs, "sm90")


def check_dpair(inputs):
    assert launches(inputs, "bwd_dpair") == 2
    actual, eager, reference = (
        results["dpair_bias"] for results in (run_op(inputs, "sm90"), eager_results(inputs), fp64_reference(inputs))
    )
    assert_no_worse_than_eager("dpair_bias", actual, eager, reference)


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_dim", (24, 32, 48, 64))
def test_head_dims(head_dim, dtype):
    check(make_inputs(shape_of(head_dim), dtype, "cuda", mask="minus_inf"))


def test_no_more_launches_below_it_or_with_a_small_head_dim():
    few = AttentionShape("few", 1, 16, 500, 530, HEADS, 32, "an eighth of the logits")
    assert launches(make_inputs(few, BF16, "cuda"), "bwd_dpair") == 1
    assert launches(make_inputs(shape_of(16), BF16, "cuda"), "bwd_dpair") == 1


@pytest.mark.parametrize(
    ("mask", "pair"),
    (("none", "transposed"), ("all_masked", "shared_samples"), ("additive", "one_head"), ("additive", "minus_inf")),
)
def test_masks_and_biases(mask, pair):
    check(make_inputs(shape_of(32, batch=2, rows=70), BF16, "cuda", mask=mask, pair=pair))


@pytest.mark.parametrize(("queries", "keys"), ((129, 70), (40, 1000), (63, 193)))
@pytest.mark.parametrize("head_dim", (32, 64))
def test_lengths(head_dim, queries, keys):
    rows = -(-(1 << 27) // (HEADS * queries * keys))
    check(make_inputs(shape_of(head_dim, rows=rows, queries=queries, keys=keys), BF16, "cuda", mask="minus_inf"))


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_dim", (32, 64))
@pytest.mark.parametrize("value", (30.0, 60.0, 200.0, 1e4))
def test_the_largest_of_the_pair_bias_is_masked(value, head_dim, dtype):
    """The other keys of the rows that drop it have logits that far above what is left of the row's reference."""
    check_dpair(with_masked_maximum(shape_of(head_dim), value, dtype))


ROW, QUERY, HEAD, KEY = 3, 40, 1, 77


def held_down(head_dim, dtype, logit):
    """Inputs with one logit of about `logit` that its bias takes back."""
    inputs = make_inputs(shape_of(head_dim), dtype, "cuda", mask="minus_inf")
    with torch.no_grad():
        inputs.mask_bias[:, ROW, ..., KEY] = 0.0
        inputs.pair_bias[:, 0, HEAD, QUERY, KEY] = -300.0
        # No other key of the row has a first element to meet the query's.
        inputs.k[0, ROW, :, HEAD, 0] = 0.0
        inputs.k[0, ROW, KEY, HEAD, 0] = 8.0
        inputs.q[0, ROW, QUERY, HEAD, 0] = logit / (8 * head_dim**-0.5)
    return inputs


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_dim", (32, 64))
def test_a_bias_that_holds_a_logit_down(head_dim, dtype):
    """Its block is computed again; all others keep their bits, but for the query whose other weights change."""
    plain, unlucky = (held_down(head_dim, dtype, logit) for logit in (0.0, 300.0))
    check_dpair(unlucky)
    expected, actual = run_op(plain, "sm90")["dpair_bias"], run_op(unlucky, "sm90")["dpair_bias"]
    assert actual[0, 0, HEAD, QUERY, KEY] != 0
    may_differ = torch.zeros_like(actual, dtype=torch.bool)
    may_differ[:, :, HEAD, QUERY] = True
    may_differ[:, :, HEAD, :128, :128] = True
    assert torch.equal(actual[~may_differ], expected[~may_differ])


@pytest.mark.parametrize("head_dim", (32, 64))
@pytest.mark.parametrize("value", (0.0, 200.0))
def test_twenty_runs_give_the_same_bits(value, head_dim):
    inputs = with_masked_maximum(shape_of(head_dim), value, BF16)
    first = run_op(inputs, "sm90")
    for _ in range(19):
        again = run_op(inputs, "sm90")
        for name, tensor in first.tensors.items():
            assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("head_dim", (32, 64))
def test_a_cuda_graph_captured_with_lucky_rows_replays_unlucky_ones_and_back(head_dim):
    lucky, *others = (with_masked_maximum(shape_of(head_dim), value, BF16) for value in (0.0, 200.0, 0.0))
    expected = [(inputs, run_op(inputs, "sm90")) for inputs in others]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_op(lucky, "sm90")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_op(lucky, "sm90")
    for inputs, results in expected:
        for old, new in zip((*lucky.tensors()[:5], lucky.do), (*inputs.tensors()[:5], inputs.do), strict=True):
            old.data.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        for name, tensor in results.tensors.items():
            assert torch.equal(captured[name], tensor), name

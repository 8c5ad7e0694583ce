# SPDX-License-Identifier: Apache-2.0
"""The comparison itself: it passes what is right and fails what is not."""

import pytest
import torch

from tests.helpers import numerics
from tests.helpers.inputs import make_inputs
from tests.helpers.numerics import (
    assert_no_worse_than_eager,
    check_against_eager,
    eager_evoformer_attention,
    eager_results,
    fp64_reference,
    run,
    run_in_chunks,
)
from tests.helpers.shapes import AttentionShape

SHAPE = AttentionShape("compare", 2, 6, 40, 40, 2, 16, "large enough for stable rms errors")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(params=DTYPES, ids=str)
def case(request):
    """(eager, reference) outputs of one problem; the eager one also plays the tensor under test."""
    inputs = make_inputs(SHAPE, request.param)
    return eager_results(inputs)["o"], fp64_reference(inputs)["o"]


def test_eager_itself_passes(case):
    eager, reference = case
    assert_no_worse_than_eager("o", eager, eager, reference)


def test_the_rounded_reference_passes_where_eager_is_exact_by_luck(case):
    eager, reference = case
    rounded = reference.to(eager.dtype)
    assert_no_worse_than_eager("o", rounded, rounded, reference)


@pytest.mark.parametrize("relative", [0.02, 0.05])
def test_a_perturbed_output_fails(case, relative):
    eager, reference = case
    with pytest.raises(AssertionError, match="o: (rms|max) error"):
        assert_no_worse_than_eager("o", (eager * (1 + relative)).to(eager.dtype), eager, reference)


def test_a_single_wrong_element_fails(case):
    eager, reference = case
    wrong = eager.clone()
    wrong[0, 0, 3, 1, 2] += 0.1
    with pytest.raises(AssertionError, match="o: (rms|max) error"):
        assert_no_worse_than_eager("o", wrong, eager, reference)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_single_element_that_is_not_finite_fails(case, value):
    eager, reference = case
    wrong = eager.clone()
    wrong[0, 0, 3, 1, 2] = value
    with pytest.raises(AssertionError, match="o: 1 elements are not finite"):
        assert_no_worse_than_eager("o", wrong, eager, reference)


def test_zeros_fail(case):
    eager, reference = case
    with pytest.raises(AssertionError, match="o: rms error"):
        assert_no_worse_than_eager("o", torch.zeros_like(eager), eager, reference)


def test_another_shape_fails(case):
    eager, reference = case
    with pytest.raises(AssertionError, match="o: shape"):
        assert_no_worse_than_eager("o", eager[:1], eager, reference)


@pytest.mark.parametrize("name", ["q", "k", "v", "mask_bias", "pair_bias"])
def test_each_wrong_gradient_is_noticed(name, monkeypatch):
    def run_wrongly(inputs, *_, **__):
        results = eager_results(inputs)
        results.tensors[f"d{name}"] = results[f"d{name}"] * 1.05
        return results

    monkeypatch.setattr(numerics, "run_op", run_wrongly)
    with pytest.raises(AssertionError, match=f"d{name}: (rms|max) error"):
        check_against_eager(make_inputs(SHAPE, torch.bfloat16))


def test_a_missing_gradient_is_noticed(monkeypatch):
    def run_partly(inputs, *_, **__):
        results = eager_results(inputs)
        del results.tensors["dk"]
        return results

    monkeypatch.setattr(numerics, "run_op", run_partly)
    with pytest.raises(KeyError, match="dk"):
        check_against_eager(make_inputs(SHAPE))


@pytest.mark.parametrize("mask", ["additive", "bool", "shared", "expanded"])
@pytest.mark.parametrize("pair", ["contiguous", "none", "expanded", "per_row"])
def test_chunks_of_rows_give_the_same_results(mask, pair):
    inputs = make_inputs(SHAPE, torch.float64, mask=mask, pair=pair)
    whole = run(eager_evoformer_attention, inputs)
    for max_bytes in (1, SHAPE.logits * 8 // 3):
        chunked = run_in_chunks(eager_evoformer_attention, inputs, max_bytes=max_bytes)
        for name, tensor in whole.tensors.items():
            torch.testing.assert_close(chunked[name], tensor)


def test_a_row_without_keys_is_zero_in_eager_too():
    results = eager_results(make_inputs(SHAPE, mask="all_masked"))
    assert torch.count_nonzero(results["o"][:, ::2]) == 0
    assert all(torch.isfinite(x).all() for x in results.tensors.values())

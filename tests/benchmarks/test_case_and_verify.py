# SPDX-License-Identifier: Apache-2.0
"""Inputs of the benchmark and the gate that keeps wrong kernels from being timed."""

import dataclasses

import pytest
import torch

from deepspeed_ds4sci.ops.reference import evoformer_attention_reference
from tests.benchmarks.case import MASK_VALUE, Case, make_inputs, with_samples_as_rows
from tests.benchmarks.peers import PEERS
from tests.benchmarks.verify import LIMITS, errors_of, expect, relative_error, run_once, spread, wrong_reason
from tests.helpers.shapes import AttentionShape

CPU = torch.device("cpu")
PLAIN = AttentionShape("plain", 2, 5, 11, 13, 3, 8, "test")
SHARED = AttentionShape("shared", 4, 2, 9, 9, 2, 8, "test", shared_pair=True)
NO_PAIR = AttentionShape("no-pair", 1, 4, 7, 7, 2, 8, "test", pair=False)


def case_of(shape: AttentionShape, **changes) -> Case:
    return dataclasses.replace(Case.of(shape, "fp32", "random", True), **changes)


def test_flops_count_two_products_forward_and_five_more_backward():
    case = case_of(PLAIN)
    assert case.logits == 2 * 5 * 3 * 11 * 13
    assert case.flops("fwd") == 4 * case.logits * 8
    assert case.flops("fwd+bwd") == 14 * case.logits * 8


def test_inputs_have_the_canonical_shapes():
    inputs = make_inputs(case_of(PLAIN), CPU)
    assert inputs.q.shape == inputs.do.shape == (2, 5, 11, 3, 8)
    assert inputs.k.shape == inputs.v.shape == (2, 5, 13, 3, 8)
    assert inputs.pair_bias.shape == (2, 1, 3, 11, 13)
    assert make_inputs(case_of(SHARED), CPU).pair_bias.shape == (1, 1, 2, 9, 9)
    assert make_inputs(case_of(NO_PAIR), CPU).pair_bias is None


def test_mask_drops_a_tenth_of_the_keys_and_never_all():
    inputs = make_inputs(case_of(AttentionShape("wide", 1, 200, 1, 200, 1, 4, "test")), CPU)
    assert 0.08 < (~inputs.keep).float().mean() < 0.12
    assert inputs.keep[..., 0].all()
    mask_bias = inputs.mask_bias()
    assert mask_bias.shape == (1, 200, 1, 1, 200)
    assert torch.equal(mask_bias == MASK_VALUE, ~inputs.keep[:, :, None, None, :])
    assert make_inputs(case_of(PLAIN, mask="none"), CPU).mask_bias() is None


def test_mask_value_fits_fp16():
    assert torch.isfinite(make_inputs(case_of(PLAIN, dtype="fp16"), CPU).mask_bias()).all()


def test_inputs_are_the_same_for_every_peer():
    first, second = (make_inputs(case_of(PLAIN), CPU) for _ in range(2))
    assert torch.equal(first.q, second.q) and torch.equal(first.keep, second.keep)


def test_samples_become_rows_only_where_they_share_the_pair_bias():
    case, inputs = case_of(SHARED), make_inputs(case_of(SHARED), CPU)
    folded, rows = with_samples_as_rows(case, inputs)
    assert (folded.batch, folded.rows) == (1, 8)
    assert rows.q.shape == (1, 8, 9, 2, 8) and rows.keep.shape == (1, 8, 9)
    assert torch.equal(rows.q[0, 5], inputs.q[2, 1])
    plain = case_of(PLAIN)
    assert with_samples_as_rows(plain, make_inputs(plain, CPU))[0] is plain


def test_spread_names_first_and_last():
    assert spread(3, 10) == [0, 4, 9]
    assert spread(3, 2) == [0, 1]
    assert spread(8, 1) == [0]


@pytest.mark.parametrize("shape", [PLAIN, NO_PAIR, SHARED], ids=str)
@pytest.mark.parametrize("mask", ["random", "none"])
@pytest.mark.parametrize("gate", [False, True])
def test_expectation_equals_autograd_of_the_reference(shape, mask, gate):
    case = case_of(shape, mask=mask, gate=gate)
    case, inputs = with_samples_as_rows(case, make_inputs(case, CPU))
    expected = expect(case, inputs)
    q, k, v = (x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    keep = None if inputs.keep is None else inputs.keep[:, :, None, None, :]
    pair_bias = None if inputs.pair_bias is None else inputs.pair_bias.double().requires_grad_()
    gates = inputs.gate.double().requires_grad_() if gate else None
    o = evoformer_attention_reference(q, k, v, mask_bias=keep, pair_bias=pair_bias, gate=gates)
    leaves = [x for x in (q, k, v, gates, pair_bias) if x is not None]
    dq, dk, dv, *dpair_bias = torch.autograd.grad(o, leaves, inputs.do.double())
    results = [(expected.o, o), (expected.dq, dq), (expected.dk, dk), (expected.dv, dv)]
    if gate:
        results.append((expected.dgate, dpair_bias.pop(0)))
    for actual, whole in results:
        torch.testing.assert_close(actual, whole.flatten(0, 1)[expected.rows].detach(), rtol=1e-9, atol=1e-12)
    if dpair_bias:
        wanted = dpair_bias[0][:, 0][:, :, expected.queries]
        torch.testing.assert_close(expected.dpair_bias, wanted, rtol=1e-9, atol=1e-12)


@pytest.fixture
def gate():
    """A right implementation bound to a case, with what is expected of it."""
    case = case_of(PLAIN)
    inputs = make_inputs(case, CPU)
    return case, PEERS["eager"].bind(case, inputs), expect(case, inputs)


def test_gate_passes_what_is_right(gate):
    case, call, expected = gate
    errors = errors_of(case, call, expected, backward=True)
    assert list(errors) == ["o", "dq", "dk", "dv", "dpair_bias"]
    assert max(errors.values()) < 1e-5 and wrong_reason(case, errors) is None
    assert list(errors_of(case, call, expected, backward=False)) == ["o"]


@pytest.mark.parametrize("spoil", [lambda o: o * 1.02, lambda o: o * 0, lambda o: o.clone().fill_(float("nan"))])
def test_gate_stops_what_is_wrong(gate, spoil):
    case, call, expected = gate
    right = call.forward
    call.forward = lambda: spoil(right())
    reason = wrong_reason(case, errors_of(case, call, expected, backward=True))
    assert reason is not None and "o " in reason and "dq " in reason


def test_gate_names_the_gradient_that_is_wrong(gate):
    case, call, expected = gate
    right = call.canonical
    call.canonical = lambda name, tensor: right(name, -tensor if name == "pair_bias" else tensor)
    assert "dpair_bias 2.0e+00" in wrong_reason(case, errors_of(case, call, expected, backward=True))


def test_relative_error_of_what_is_not_finite_is_infinite():
    ones = torch.ones(3, dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, float("inf"), 1.0]), ones) == float("inf")
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)


def test_limits_tighten_with_the_dtype():
    assert LIMITS["bf16"] > LIMITS["fp16"] > LIMITS["fp32"]


def test_gradient_of_the_pair_bias_is_left_out_when_it_is_not_wanted():
    case = case_of(PLAIN, pair_grad=False)
    inputs = make_inputs(case, CPU)
    call = PEERS["eager"].bind(case, inputs)
    assert "pair_bias" not in run_once(call, backward=True)
    assert "dpair_bias" not in errors_of(case, call, expect(case, inputs), backward=True)

# SPDX-License-Identifier: Apache-2.0
"""Random shapes, strides and masks: the tiled path equals the definition, and both keep the laws of softmax."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepspeed_ds4sci.ops import tiled
from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention
from tests.helpers.inputs import LAYOUTS, MASK_KINDS, PAIR_KINDS, make_inputs
from tests.helpers.numerics import fp64_reference, run, run_op
from tests.helpers.shapes import AttentionShape

FP64 = torch.float64
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

shapes = st.builds(
    AttentionShape,
    st.just("random"),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 4),
    st.integers(1, 20),
    st.just("hypothesis"),
)


@st.composite
def cases(draw):
    """fp64 inputs of a random shape, layout, mask and pair bias."""
    shape = draw(shapes)
    layout = draw(st.sampled_from(LAYOUTS))
    mask, pair = (
        draw(st.sampled_from([kind for kind in kinds if kind != "fp32"])) for kinds in (MASK_KINDS, PAIR_KINDS)
    )
    return make_inputs(shape, FP64, layout=layout, mask=mask, pair=pair, seed=draw(st.integers(0, 99)))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled, "MAX_TILE_KEYS", 16)
    monkeypatch.setattr(tiled, "TILE_ELEMENTS_PER_THREAD", 1024)


def assert_results_equal(actual, expected):
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(actual[name], tensor, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@SETTINGS
@given(cases())
def test_tiled_equals_the_definition(inputs):
    if inputs.mask_bias is not None and inputs.pair_bias is not None and (inputs.mask_bias == -1e9).any():
        # Every key that a row has left may carry -1e9; beside it fp64 keeps 7 digits of a logit.
        inputs.mask_bias = inputs.mask_bias.detach().clamp(min=-1e4).requires_grad_()
    assert_results_equal(run_op(inputs, "tiled"), fp64_reference(inputs))


@SETTINGS
@given(cases(), st.floats(-50, 50), st.floats(-50, 50))
def test_a_constant_added_to_a_row_changes_nothing(inputs, mask_shift, pair_shift):
    if inputs.mask_bias is None or inputs.pair_bias is None or inputs.mask_bias.dtype == torch.bool:
        return
    expected = run_op(inputs, "tiled")
    inputs.mask_bias = (inputs.mask_bias.detach() + mask_shift).requires_grad_()
    inputs.pair_bias = (inputs.pair_bias.detach() + pair_shift).requires_grad_()
    actual = run_op(inputs, "tiled")
    for name in ("o", "dq", "dk", "dv"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


@SETTINGS
@given(shapes, st.randoms(use_true_random=False))
def test_the_order_of_the_keys_does_not_matter(shape, random):
    inputs = make_inputs(shape, FP64, mask="minus_inf")
    order = list(range(shape.k_len))
    random.shuffle(order)
    shuffled = evoformer_attention(
        inputs.q,
        inputs.k[:, :, order],
        inputs.v[:, :, order],
        mask_bias=inputs.mask_bias[..., order],
        pair_bias=inputs.pair_bias[..., order],
    )
    torch.testing.assert_close(shuffled, run_op(inputs)["o"], **TOLERANCE)


@SETTINGS
@given(shapes, st.integers(0, 99))
def test_dropped_keys_might_as_well_not_be_there(shape, seed):
    inputs = make_inputs(shape, FP64, seed=seed)
    keep = torch.rand(shape.k_len, generator=torch.Generator().manual_seed(seed)) > 0.5
    masked = evoformer_attention(
        inputs.q, inputs.k, inputs.v, mask_bias=keep.view(1, 1, 1, 1, -1), pair_bias=inputs.pair_bias
    )
    cut = evoformer_attention(
        inputs.q, inputs.k[:, :, keep], inputs.v[:, :, keep], pair_bias=inputs.pair_bias[..., keep]
    )
    torch.testing.assert_close(masked, cut, **TOLERANCE)


@SETTINGS
@given(cases())
def test_the_mask_gradient_of_a_row_sums_to_zero(inputs):
    """A constant added to a row changes nothing, so neither do its gradients add up to anything."""
    results = run_op(inputs, "tiled")
    for name in ("dmask_bias", "dpair_bias"):
        if name in results.tensors:
            sums = results[name].sum(dim=-1)
            torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-9)


@SETTINGS
@given(cases(), st.floats(-2, 2))
def test_the_scale_multiplies_q(inputs, scale):
    expected = run(lambda q, k, v, **biases: evoformer_attention(q * scale, k, v, softmax_scale=1.0, **biases), inputs)
    assert_results_equal(run_op(inputs, "tiled", softmax_scale=scale), expected)


@SETTINGS
@given(cases())
def test_outputs_lie_within_the_values(inputs):
    o = run_op(inputs, "tiled")["o"]
    highest = inputs.v.detach().amax(dim=2, keepdim=True).clamp(min=0)
    lowest = inputs.v.detach().amin(dim=2, keepdim=True).clamp(max=0)
    assert ((o <= highest + 1e-9) & (o >= lowest - 1e-9)).all()

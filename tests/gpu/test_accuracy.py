# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels against the numerical bar: o and every gradient, no worse than eager PyTorch in the same dtype."""

import dataclasses

import pytest
import torch

from tests.helpers import shapes
from tests.helpers.inputs import LAYOUTS, MASK_KINDS, PAIR_KINDS, make_inputs
from tests.helpers.numerics import (
    assert_no_worse_than_eager,
    check_against_eager,
    eager_results,
    fp64_reference,
    run_op,
)

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
SMALL = shapes.AttentionShape("small", 2, 5, 72, 100, 3, 32, "tails on every axis")


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", shapes.BOUNDARY, ids=str)
def test_boundary_shapes(shape, dtype):
    check_against_eager(make_inputs(shape, dtype, "cuda"), "sm80")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("mask", MASK_KINDS)
def test_mask_kinds(mask, dtype):
    check_against_eager(make_inputs(SMALL, dtype, "cuda", mask=mask), "sm80")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pair", [kind for kind in PAIR_KINDS if kind != "expanded"])
@pytest.mark.parametrize("mask", ("none", "minus_inf"))
def test_pair_kinds(pair, mask, dtype):
    check_against_eager(make_inputs(SMALL, dtype, "cuda", mask=mask, pair=pair), "sm80")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_expanded_pair_bias_equals_the_one_it_was_expanded_from(dtype):
    inputs = make_inputs(SMALL, dtype, "cuda", pair="contiguous")
    expected = run_op(inputs, "sm80")
    inputs.pair_bias = inputs.pair_bias.detach().expand(-1, SMALL.rows, -1, -1, -1).requires_grad_()
    actual = run_op(inputs, "sm80")
    for name, tensor in expected.tensors.items():
        if name == "dpair_bias":  # rounded once per row, then summed
            total = actual[name].sum(1, keepdim=True, dtype=torch.float32)
            torch.testing.assert_close(total, tensor.float(), rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    shape = shapes.AttentionShape("square", 2, 40, 40, 40, 2, 24, "a transposed view needs N = L")
    check_against_eager(make_inputs(shape, dtype, "cuda", layout=layout), "sm80")


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=dtype_id)
@pytest.mark.parametrize("head_dim", shapes.HEAD_DIMS)
def test_fp32_bias_with_16_bit_operands(head_dim, dtype):
    shape = dataclasses.replace(SMALL, head_dim=head_dim)
    check_against_eager(make_inputs(shape, dtype, "cuda", mask="fp32", pair="fp32"), "sm80")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("spread", (4.0, 20.0), ids=("logits-100", "logits-2000"))
def test_large_logits(spread, dtype):
    check_against_eager(make_inputs(SMALL, dtype, "cuda", spread=spread), "sm80")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_one_dominating_key(dtype):
    """The key's weight is 1 and its logit far above the rest, which an unlucky softmax reference cannot hold."""
    inputs = make_inputs(SMALL, dtype, "cuda")
    with torch.no_grad():
        inputs.pair_bias[..., 77] = 120.0
        inputs.pair_bias[..., :64] = -200.0
    actual, reference, eager = run_op(inputs, "sm80"), fp64_reference(inputs), eager_results(inputs)
    for name in ("o", "dv"):
        assert_no_worse_than_eager(name, actual[name], eager[name], reference[name])
    # What is left of the other gradients is the rounding of dP - delta, two equal numbers of the size of |do| |v|.
    unit = inputs.do.norm(dim=-1).max().item() * inputs.v.detach().norm(dim=-1).max().item() * torch.finfo(dtype).eps
    for name in ("dq", "dk", "dmask_bias", "dpair_bias"):
        assert actual[name].abs().max().item() <= 8 * unit, name


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_first_tiles_fully_masked(dtype):
    shape = dataclasses.replace(SMALL, k_len=200)
    inputs = make_inputs(shape, dtype, "cuda")
    with torch.no_grad():
        inputs.mask_bias[..., :130] = float("-inf")
    check_against_eager(inputs, "sm80")


def test_complementary_masks_leave_zero_and_no_nan():
    inputs = make_inputs(SMALL, BF16, "cuda")
    with torch.no_grad():
        inputs.mask_bias[..., ::2] = float("-inf")
        inputs.pair_bias[..., 1::2] = float("-inf")
    for tensor in run_op(inputs, "sm80").tensors.values():
        assert torch.count_nonzero(tensor) == 0  # NaN counts as nonzero


@pytest.mark.parametrize("value", (-1e4, -1e9, -1e38))
def test_rows_of_large_negatives_are_softmax_of_the_rest(value):
    plain, shifted = (make_inputs(SMALL, FP32, "cuda") for _ in range(2))
    with torch.no_grad():
        for inputs, constant in ((plain, 0.0), (shifted, value)):
            inputs.mask_bias[:, 1] = constant
            inputs.pair_bias[..., 3, :] = constant
    expected, actual = run_op(plain, "sm80"), run_op(shifted, "sm80")
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "shape", [shapes.BY_NAME[name] for name in ("deepspeed-test-512", "template-256", "pairformer-768")], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_real_sizes(shape, dtype):
    check_against_eager(make_inputs(shape, dtype, "cuda"), "sm80")


def test_pair_gradient_over_many_rows_keeps_fp32():
    """Relative error of a sum over 512 rows, against a reference that sums in fp64."""
    shape = shapes.AttentionShape("rows-512", 1, 512, 64, 64, 2, 32, "sum over many rows")
    inputs = make_inputs(shape, BF16, "cuda", mask="none", pair="fp32")
    actual, reference = run_op(inputs, "sm80")["dpair_bias"].double(), fp64_reference(inputs)["dpair_bias"]
    assert ((actual - reference).norm() / reference.norm()).item() <= 1e-3


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=dtype_id)
def test_more_blocks_than_a_grid_axis(dtype):
    check_against_eager(make_inputs(shapes.MANY_ROWS, dtype, "cuda"), "sm80")


@pytest.mark.slow
def test_tensors_above_2_to_the_31_elements():
    """The last rows of a tensor whose offsets need 64 bits, against those rows alone."""
    shape = shapes.LARGE_TENSOR
    tail = dataclasses.replace(shape, rows=2)
    inputs = make_inputs(tail, BF16, "cuda", mask="none", pair="none")
    large = []
    for x in (inputs.q, inputs.k, inputs.v):
        whole = torch.zeros((1, shape.rows, shape.q_len, shape.heads, shape.head_dim), dtype=BF16, device="cuda")
        whole[:, -2:] = x.detach()
        assert whole.numel() > 2**31
        large.append(whole.requires_grad_())
    do = torch.zeros_like(large[0])
    do[:, -2:] = inputs.do
    from deepspeed_ds4sci import evoformer_attention

    o = evoformer_attention(*large, implementation="sm80")
    grads = torch.autograd.grad(o, large, do)
    eager, reference = eager_results(inputs, max_bytes=1 << 30), fp64_reference(inputs, max_bytes=1 << 30)
    for name, tensor in zip(("o", "dq", "dk", "dv"), (o.detach(), *grads), strict=True):
        assert_no_worse_than_eager(name, tensor[:, -2:], eager[name], reference[name])

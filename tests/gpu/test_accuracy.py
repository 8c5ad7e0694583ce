# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels against the numerical bar: o and every gradient, no worse than eager PyTorch in the same dtype."""

import dataclasses

import pytest
import torch

from deepspeed_ds4sci import evoformer_attention
from tests.helpers import shapes
from tests.helpers.inputs import GATE_KINDS, LAYOUTS, MASK_KINDS, PAIR_KINDS, make_inputs
from tests.helpers.numerics import (
    assert_no_worse_than_eager,
    check_against_eager,
    eager_results,
    fp64_reference,
    run_op,
)

from .runs import IMPLEMENTATIONS, RUNS, RUNS_16_BIT, with_head_dims, with_shapes

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
SMALL = shapes.AttentionShape("small", 2, 5, 72, 100, 3, 32, "tails on every axis")
# Rows that do and do not fill the blocks of each head dim, and lengths just past many tiles.
MORE = tuple(
    shapes.AttentionShape(f"N{rows}-D{head_dim}", 2, rows, 70, 140, 2, head_dim, "rows of a block")
    for rows in range(1, 8)
    for head_dim in (8, 32, 40, 64)
) + tuple(shapes.AttentionShape(f"L{n}-N2", 1, 2, n, n, 2, 32, "tails") for n in (511, 1000, 1217))


@pytest.mark.parametrize(("shape", "implementation", "dtype"), with_shapes(shapes.MANY_ITEMS))
@pytest.mark.parametrize("pair", ("none", "contiguous"))
@pytest.mark.parametrize("gate", (None, "contiguous"))
def test_many_work_items(gate, pair, shape, implementation, dtype):
    check_against_eager(make_inputs(shape, dtype, "cuda", pair=pair, gate=gate), implementation)


@pytest.mark.parametrize(("shape", "implementation", "dtype"), with_shapes(shapes.BOUNDARY + MORE))
def test_boundary_shapes(shape, implementation, dtype):
    check_against_eager(make_inputs(shape, dtype, "cuda"), implementation)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("mask", MASK_KINDS)
def test_mask_kinds(mask, implementation, dtype):
    check_against_eager(make_inputs(SMALL, dtype, "cuda", mask=mask), implementation)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("pair", [kind for kind in PAIR_KINDS if kind not in ("expanded", "fp32")])
@pytest.mark.parametrize("mask", ("none", "minus_inf"))
def test_pair_kinds(pair, mask, implementation, dtype):
    check_against_eager(make_inputs(SMALL, dtype, "cuda", mask=mask, pair=pair), implementation)


@pytest.mark.parametrize(("shape", "implementation", "dtype"), with_shapes(shapes.BOUNDARY[::2] + MORE[::3]))
def test_gates_of_boundary_shapes(shape, implementation, dtype):
    check_against_eager(make_inputs(shape, dtype, "cuda", gate="contiguous"), implementation)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("mask", ("none", "all_masked"))
@pytest.mark.parametrize("pair", ("none", "contiguous"))
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_gate_kinds(gate, pair, mask, implementation, dtype):
    shape = shapes.AttentionShape("square", 2, 72, 72, 100, 3, 32, "a transposed view needs N = Lq")
    check_against_eager(make_inputs(shape, dtype, "cuda", mask=mask, pair=pair, gate=gate), implementation)


@pytest.mark.parametrize(("head_dim", "implementation", "dtype"), with_head_dims((*shapes.HEAD_DIMS, 5, 33)))
def test_gates_of_head_dims(head_dim, implementation, dtype):
    shape = dataclasses.replace(SMALL, head_dim=head_dim)
    check_against_eager(make_inputs(shape, dtype, "cuda", gate="contiguous"), implementation)


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
def test_expanded_pair_bias_equals_the_one_it_was_expanded_from(implementation, dtype):
    inputs = make_inputs(SMALL, dtype, "cuda", pair="contiguous")
    expected = run_op(inputs, implementation)
    inputs.pair_bias = inputs.pair_bias.detach().expand(-1, SMALL.rows, -1, -1, -1).requires_grad_()
    actual = run_op(inputs, implementation)
    for name, tensor in expected.tensors.items():
        if name == "dpair_bias":  # rounded once per row, then summed
            total = actual[name].sum(1, keepdim=True, dtype=torch.float32)
            torch.testing.assert_close(total, tensor.float(), rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, implementation, dtype):
    shape = shapes.AttentionShape("square", 2, 40, 40, 40, 2, 24, "a transposed view needs N = L")
    check_against_eager(make_inputs(shape, dtype, "cuda", layout=layout), implementation)


@pytest.mark.parametrize(("head_dim", "implementation", "dtype"), with_head_dims(shapes.HEAD_DIMS))
def test_fp32_mask_with_16_bit_operands(head_dim, implementation, dtype):
    shape = dataclasses.replace(SMALL, head_dim=head_dim)
    check_against_eager(make_inputs(shape, dtype, "cuda", mask="fp32"), implementation)


@pytest.mark.parametrize("mask", ("none", "minus_inf", "fp32"))
@pytest.mark.parametrize("head_dim", shapes.HEAD_DIMS)
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
def test_fp32_pair_bias_with_16_bit_operands(head_dim, mask, dtype):
    """Without a name: the Hopper kernels leave it to the portable ones."""
    shape = dataclasses.replace(SMALL, head_dim=head_dim)
    check_against_eager(make_inputs(shape, dtype, "cuda", mask=mask, pair="fp32"))


@pytest.mark.parametrize("head_dim", (5, 16, 32, 64))
@pytest.mark.parametrize(("implementation", "dtype"), RUNS_16_BIT)
def test_softmax_scale(head_dim, implementation, dtype):
    """Far from the usual one; the Hopper kernels divide mask and lse by it."""
    shape = dataclasses.replace(SMALL, head_dim=head_dim)
    for scale in (0.01, 3.0):
        inputs = make_inputs(shape, dtype, "cuda", mask="minus_inf", spread=0.5)
        check_against_eager(inputs, implementation, softmax_scale=scale)


@pytest.mark.parametrize("which", ("q", "k", "v", "do", "pair_bias", "gate"))
@pytest.mark.parametrize("axis", (0, 1, 2, 3))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_expanded_views_give_the_bits_of_their_copies(implementation, axis, which):
    """Stride 0 along an axis, as `expand` and the gradient of a sum leave it."""
    shape = dataclasses.replace(SMALL, k_len=72)
    views, copies = (make_inputs(shape, BF16, "cuda", gate="contiguous") for _ in range(2))
    x = getattr(views, which).detach()
    view = x.narrow(axis, 0, 1).expand(x.shape)
    setattr(views, which, view.requires_grad_(which != "do"))
    setattr(copies, which, view.contiguous().requires_grad_(which != "do"))
    names = [name for name in copies.differentiable() if name != which]

    def results(inputs):
        o = evoformer_attention(**inputs.named(), implementation=implementation)
        return (o, *torch.autograd.grad(o, [getattr(inputs, name) for name in names], inputs.do))

    for name, actual, expected in zip(("o", *names), results(views), results(copies), strict=True):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("gate", (None, "contiguous"))
@pytest.mark.parametrize(
    "shape", [shapes.BY_NAME[name] for name in ("deepspeed-test-512", "template-256", "pairformer-768")], ids=str
)
@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
def test_real_sizes(shape, implementation, dtype, gate):
    check_against_eager(make_inputs(shape, dtype, "cuda", gate=gate), implementation)


def test_pair_gradient_over_many_rows_keeps_fp32():
    """Relative error of a sum over 512 rows, against a reference that sums in fp64."""
    shape = shapes.AttentionShape("rows-512", 1, 512, 64, 64, 2, 32, "sum over many rows")
    inputs = make_inputs(shape, BF16, "cuda", mask="none", pair="fp32")
    actual, reference = run_op(inputs)["dpair_bias"].double(), fp64_reference(inputs)["dpair_bias"]
    assert ((actual - reference).norm() / reference.norm()).item() <= 1e-3


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
def test_more_blocks_than_a_grid_axis(implementation, dtype):
    check_against_eager(make_inputs(shapes.MANY_ROWS, dtype, "cuda"), implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tensors_above_2_to_the_31_elements(implementation):
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
    o = evoformer_attention(*large, implementation=implementation)
    grads = torch.autograd.grad(o, large, do)
    eager, reference = eager_results(inputs, max_bytes=1 << 30), fp64_reference(inputs, max_bytes=1 << 30)
    for name, tensor in zip(("o", "dq", "dk", "dv"), (o.detach(), *grads), strict=True):
        assert_no_worse_than_eager(name, tensor[:, -2:], eager[name], reference[name])

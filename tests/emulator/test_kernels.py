# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run by the emulator through the whole op: the numerical bar, layouts, masks, determinism.

What tests/gpu asks of the kernels on a GPU, on shapes small enough for one CPU thread.
"""

import shutil

import pytest
import torch

from deepspeed_ds4sci.ops import _dispatch, sm80
from deepspeed_ds4sci.ops._extension import Extension
from tests.emulator.build import build
from tests.helpers.inputs import GATE_KINDS, make_inputs
from tests.helpers.numerics import check_against_eager, run_op
from tests.helpers.shapes import AttentionShape

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulator with")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def emulated_library():
    return Extension(build())


@pytest.fixture(autouse=True)
def emulated(monkeypatch, emulated_library):
    """implementation="sm80" runs the emulated kernels on CPU tensors."""
    monkeypatch.setattr(sm80, "extension", lambda: emulated_library)
    monkeypatch.setattr(type(sm80.SM80), "unsupported_reason", lambda self, problem: None)
    _dispatch.forget_choices()
    yield
    _dispatch.forget_choices()


def shape(name, batch, rows, q_len, k_len, heads, head_dim):
    return AttentionShape(name, batch, rows, q_len, k_len, heads, head_dim, "emulator")


SHAPES = (
    shape("one-element", 1, 1, 1, 1, 1, 8),
    shape("one-tile", 1, 2, 64, 32, 1, 16),
    shape("tails", 1, 3, 70, 67, 2, 32),
    shape("batches", 2, 3, 17, 33, 2, 32),
    shape("one-query", 1, 2, 1, 130, 1, 32),
    shape("one-row", 2, 1, 65, 40, 2, 48),
    shape("D64", 1, 2, 66, 50, 1, 64),
    shape("D128", 1, 2, 40, 36, 1, 128),
    shape("D96", 1, 2, 33, 20, 1, 96),
    shape("D5", 1, 2, 20, 21, 2, 5),
    shape("D24", 1, 2, 30, 65, 2, 24),
    # Statistics of a row take more than one block, and the last of them is not full, with one lane a vector and two.
    shape("blocks-D8", 1, 2, 130, 20, 3, 8),
    shape("blocks-D16", 1, 2, 130, 20, 3, 16),
)


GATED_SHAPES = (
    shape("one-element", 1, 1, 1, 1, 1, 8),
    shape("one-key", 1, 3, 100, 1, 2, 32),  # dP - delta is 0 but for rounding
    shape("tails", 1, 3, 70, 67, 2, 32),
    shape("batches", 2, 3, 17, 33, 2, 32),
    shape("one-row", 2, 1, 65, 40, 2, 48),
    shape("D128", 1, 2, 40, 36, 1, 128),
    shape("D5", 1, 2, 20, 21, 2, 5),
    shape("D24", 1, 2, 30, 65, 2, 24),
)


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize("problem", SHAPES, ids=str)
def test_shapes(problem, dtype):
    check_against_eager(make_inputs(problem, dtype), "sm80")


SMALL = shape("small", 2, 3, 20, 36, 2, 16)


@pytest.mark.parametrize("mask", ("none", "fp32", "bool", "padded", "all_masked", "minus_inf", "shared", "expanded"))
def test_masks(mask):
    check_against_eager(make_inputs(SMALL, BF16, mask=mask), "sm80")


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
@pytest.mark.parametrize(
    "pair", ("none", "transposed", "last_heads", "fp32", "per_row", "shared_samples", "one_head", "minus_inf")
)
def test_pair_biases(pair, dtype):
    check_against_eager(make_inputs(SMALL, dtype, pair=pair), "sm80")


@pytest.mark.parametrize("layout", ("ending_node", "packed_qkv", "unaligned", "strided_last", "heads_first"))
def test_layouts(layout):
    square = shape("square", 1, 20, 20, 20, 2, 24)
    check_against_eager(make_inputs(square, BF16, layout=layout), "sm80")


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize("problem", GATED_SHAPES, ids=str)
def test_gates_of_shapes(problem, dtype):
    check_against_eager(make_inputs(problem, dtype, gate="contiguous"), "sm80")


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize("gate", GATE_KINDS)
def test_gates(gate, dtype):
    square = shape("square", 2, 20, 20, 24, 1, 24)
    check_against_eager(make_inputs(square, dtype, mask="all_masked", gate=gate), "sm80")


def test_a_gate_leaves_rows_without_keys_at_zero():
    inputs = make_inputs(SMALL, BF16, mask="all_masked", gate="contiguous")
    results = run_op(inputs, "sm80")
    for name in ("o", "dq", "dk", "dv", "dmask_bias", "dgate"):
        assert torch.count_nonzero(results[name][:, ::2]) == 0, name  # NaN counts as nonzero
        assert torch.count_nonzero(results[name][:, 1::2]) > 0, name


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
@pytest.mark.parametrize(("queries", "bias"), [(slice(None), 120.0), (5, 120.0), (5, 9.0)], ids=str)
def test_gates_beside_a_key_with_all_the_weight(queries, bias, dtype):
    """dP - delta is 0 there, or nearly; dO and the gated output from which delta comes are rounded."""
    inputs = make_inputs(SMALL, dtype, gate="contiguous")
    with torch.no_grad():
        inputs.pair_bias[..., queries, 20] = bias
    check_against_eager(inputs, "sm80")


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
def test_an_open_gate_changes_the_order_of_delta_alone(dtype):
    """sigmoid(100) is 1. What delta enters may differ by the rounding of its sum, which other lanes add up."""
    plain, gated = (make_inputs(SMALL, dtype) for _ in range(2))
    gated.gate = torch.full_like(gated.q, 100.0)
    expected = run_op(plain, "sm80")
    for name, tensor in run_op(gated, "sm80").tensors.items():
        if name in ("o", "dv"):
            assert torch.equal(tensor, expected[name]), name
        else:
            error = (tensor.double() - expected[name].double()).norm() / expected[name].double().norm()
            assert error <= torch.finfo(dtype).eps / 2, name


def test_a_gate_without_a_gradient_of_its_own_and_the_other_way_round():
    inputs = make_inputs(SMALL, BF16, gate="contiguous")
    every = run_op(inputs, "sm80")
    for wanted in (("gate",), ("q", "k", "v"), ("pair_bias",)):
        for name, tensor in inputs.named().items():
            tensor.requires_grad_(name in wanted)
        some = run_op(inputs, "sm80")
        assert set(some.tensors) == {"o", *(f"d{name}" for name in wanted)}
        for name, tensor in some.tensors.items():
            assert torch.equal(tensor, every[name]), name


@pytest.mark.parametrize("value", (-1e9, -1e38))
def test_rows_of_large_negatives_are_softmax_of_the_rest(value):
    plain, shifted = (make_inputs(SMALL, FP32) for _ in range(2))
    with torch.no_grad():
        for inputs, constant in ((plain, 0.0), (shifted, value)):
            inputs.mask_bias[:, 1] = constant
            inputs.pair_bias[..., 3, :] = constant
    expected, actual = run_op(plain, "sm80"), run_op(shifted, "sm80")
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
def test_complementary_masks(dtype):
    inputs = make_inputs(SMALL, dtype)
    with torch.no_grad():
        inputs.mask_bias[..., ::2] = float("-inf")
        inputs.pair_bias[..., 1::2] = float("-inf")
    for tensor in run_op(inputs, "sm80").tensors.values():
        assert torch.count_nonzero(tensor) == 0  # NaN counts as nonzero


@pytest.mark.parametrize("value", (-1e6, -1e9))
def test_complementary_large_negatives(value):
    """Every key is dropped by a finite bias: what is left of the logits in fp32 decides, in both passes."""
    inputs = make_inputs(SMALL, FP32)
    with torch.no_grad():
        inputs.mask_bias[..., ::2] = value
        inputs.pair_bias[..., 1::2] = value
    check_against_eager(inputs, "sm80")


def test_complementary_large_negatives_have_no_gradient_in_16_bits():
    """An lse of -1e9 in fp32 no longer tells such a row's keys apart."""
    inputs = make_inputs(SMALL, BF16)
    with torch.no_grad():
        inputs.mask_bias[..., ::2] = inputs.pair_bias[..., 1::2] = -1e9
    results = run_op(inputs, "sm80")
    torch.testing.assert_close(results["o"], inputs.v.mean(2, keepdim=True).expand_as(results["o"]), atol=5e-3, rtol=0)
    for name, tensor in results.tensors.items():
        assert name == "o" or torch.count_nonzero(tensor) == 0, name


def test_large_logits():
    check_against_eager(make_inputs(SMALL, FP32, spread=20.0), "sm80")


@pytest.mark.parametrize("gate", (None, "contiguous"))
def test_copies_that_land_at_once_change_nothing(gate, monkeypatch):
    """Copies land when waited for (the default here) or at once: a race with either shows as a difference."""
    inputs = make_inputs(shape("tiles", 1, 3, 70, 100, 1, 32), BF16, gate=gate)
    late = run_op(inputs, "sm80")
    monkeypatch.setenv("DS4SCI_EMULATE_COPIES", "eager")
    early = run_op(inputs, "sm80")
    for name, tensor in late.tensors.items():
        assert torch.equal(early[name], tensor), name


def test_deepspeed_entry_points(emulated_library):
    inputs = make_inputs(shape("deepspeed", 1, 2, 40, 40, 2, 16), BF16)
    expected = run_op(inputs, "sm80")
    q, k, v, mask, pair = (x.detach() for x in inputs.tensors()[:5])
    o, lse = torch.empty_like(q), torch.empty((2, 2, 64), dtype=FP32)
    emulated_library.attention(q, k, v, mask, pair, o, lse)
    assert torch.equal(o, expected["o"])
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    db1, db2 = torch.zeros_like(mask, dtype=FP32), torch.empty(0)
    emulated_library.attention_bwd(inputs.do, q, k, v, o, lse, torch.empty_like(lse), mask, pair, *gradients, db1, db2)
    for name, actual in zip(("dq", "dk", "dv", "dmask_bias"), (*gradients, db1.bfloat16()), strict=True):
        assert torch.equal(actual, expected[name]), name


def test_failed_call_names_its_reason(emulated_library):
    q = torch.zeros(1, 1, 4, 1, 256, dtype=BF16)
    with pytest.raises(RuntimeError, match="head_dim must be a multiple of 16 bytes, at most 128 elements"):
        emulated_library.forward(q, q, q, None, None, None, 1.0)


def test_library_of_other_sources_is_refused(monkeypatch, emulated_library):
    monkeypatch.setattr("deepspeed_ds4sci.ops._extension.ctypes.sizeof", lambda struct: 8)
    with pytest.raises(RuntimeError, match="takes parameters of"):
        Extension(emulated_library.path)

# SPDX-License-Identifier: Apache-2.0
"""The tiled path against the numerical bar, with small tiles so that tails and several tiles occur at test sizes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_ds4sci.ops import tiled
from deepspeed_ds4sci.ops._dispatch import problem_of
from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention
from tests.helpers import shapes
from tests.helpers.inputs import GATE_KINDS, LAYOUTS, MASK_KINDS, PAIR_KINDS, make_inputs
from tests.helpers.numerics import check_against_eager, fp64_reference, run_op
from tests.helpers.shapes import AttentionShape

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (FP32, BF16, FP16)
SMALL = AttentionShape("small", 2, 3, 40, 72, 3, 16, "tails on every axis once tiles are 32 keys long")


def dtype_id(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 32 keys and about 4096 elements: every loop of the file runs more than once."""
    monkeypatch.setattr(tiled, "MAX_TILE_KEYS", 32)
    monkeypatch.setattr(tiled, "TILE_ELEMENTS_PER_THREAD", 4096)


def assert_close_to_fp64(inputs, tolerance=1e-11):
    actual, reference = run_op(inputs, "tiled"), fp64_reference(inputs)
    for name, expected in reference.tensors.items():
        torch.testing.assert_close(
            actual[name], expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def affordable(candidates, logits=3e6):
    return [shape for shape in candidates if shape.logits <= logits]


@pytest.mark.parametrize("shape", affordable(shapes.BOUNDARY) + list(shapes.SMALL_USES), ids=str)
def test_boundary_shapes_and_uses(shape):
    check_against_eager(make_inputs(shape), "tiled")


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=dtype_id)
@pytest.mark.parametrize("name", ["L1", "L17", "L65", "L257", "Lq1-Lk513", "Lq513-Lk1", "N1", "D5", "D128"])
def test_boundary_shapes_in_16_bit(name, dtype):
    shape = next(shape for shape in shapes.BOUNDARY if shape.name == name)
    check_against_eager(make_inputs(shape, dtype, mask="bool"), "tiled")


@pytest.mark.parametrize("name", ["L1", "L17", "L100", "Lq64-Lk1000", "D1"])
def test_fp64_stays_fp64(name):
    shape = next(shape for shape in shapes.BOUNDARY if shape.name == name)
    assert_close_to_fp64(make_inputs(shape, FP64))


@pytest.mark.parametrize("pair", PAIR_KINDS)
@pytest.mark.parametrize("mask", MASK_KINDS)
def test_biases_over_several_tiles(mask, pair, small_tiles):
    check_against_eager(make_inputs(SMALL, FP32, mask=mask, pair=pair), "tiled")


@pytest.mark.parametrize(
    "mask, pair",
    [
        ("fp32", "fp32"),
        ("bool", "last_heads"),
        ("padded", "shared_samples"),
        ("all_masked", "one_head"),
        ("minus_inf", "minus_inf"),
        ("none", "none"),
    ],
)
@pytest.mark.parametrize("dtype", (BF16, FP16), ids=dtype_id)
def test_biases_in_16_bit_over_several_tiles(dtype, mask, pair, small_tiles):
    check_against_eager(make_inputs(SMALL, dtype, mask=mask, pair=pair), "tiled")


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, small_tiles):
    shape = AttentionShape("square", 2, 40, 40, 40, 2, 24, "a transposed view needs N = L")
    check_against_eager(make_inputs(shape, dtype, layout=layout), "tiled")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("gate", GATE_KINDS)
@pytest.mark.parametrize("mask", ["additive", "all_masked"])
def test_gates(mask, gate, dtype, small_tiles):
    shape = AttentionShape("square", 2, 40, 40, 72, 2, 24, "a transposed view needs N = Lq")
    check_against_eager(make_inputs(shape, dtype, mask=mask, gate=gate), "tiled")


@pytest.mark.parametrize("name", ["L1", "L17", "L257", "Lq1-Lk513", "Lq513-Lk1", "D5", "D128", "small-diffusion"])
def test_gates_of_boundary_shapes(name):
    shape = next(shape for shape in (*shapes.BOUNDARY, *shapes.SMALL_USES) if shape.name == name)
    check_against_eager(make_inputs(shape, BF16, gate="contiguous"), "tiled")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("queries", "bias"), [(slice(None), 120.0), (5, 120.0), (5, 9.0)], ids=str)
def test_gates_beside_a_key_with_all_the_weight(queries, bias, dtype, small_tiles):
    """dP - delta is 0 there, or nearly; the gated output from which delta comes is rounded."""
    inputs = make_inputs(SMALL, dtype, gate="contiguous")
    with torch.no_grad():
        inputs.pair_bias[..., queries, 50] = bias
    check_against_eager(inputs, "tiled")


def test_without_a_gate_of_ones_nothing_changes(small_tiles):
    """sigmoid(100) is 1: the gated op's bits are those of the op without a gate."""
    plain, gated = make_inputs(SMALL), make_inputs(SMALL)
    gated.gate = torch.full_like(gated.q, 100.0)
    expected = run_op(plain, "tiled")
    for name, tensor in run_op(gated, "tiled").tensors.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("elements", [1, 1 << 10, 1 << 14, 1 << 22])
@pytest.mark.parametrize("max_keys", [8, 24, 512])
def test_any_tile_size_is_right(elements, max_keys, monkeypatch):
    monkeypatch.setattr(tiled, "MAX_TILE_KEYS", max_keys)
    monkeypatch.setattr(tiled, "TILE_ELEMENTS_PER_THREAD", elements)
    assert_close_to_fp64(make_inputs(SMALL, FP64, mask="minus_inf"))


@pytest.mark.parametrize("tiles", ["one", "several"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
class TestInputsThatDefeatAStaticMaximum:
    @pytest.fixture(autouse=True)
    def tile_size(self, tiles, request):
        if tiles == "several":
            request.getfixturevalue("small_tiles")

    @pytest.mark.parametrize("spread", [7.0, 50.0], ids=["logits-200", "logits-1e4"])
    def test_large_logits(self, dtype, tiles, spread):
        check_against_eager(make_inputs(SMALL, dtype, spread=spread), "tiled")

    def test_one_dominating_key(self, dtype, tiles):
        inputs = make_inputs(SMALL, dtype)
        with torch.no_grad():
            inputs.pair_bias[..., 50] = 120.0
            inputs.pair_bias[..., :32] = -200.0
        check_against_eager(inputs, "tiled")

    def test_first_tile_dropped(self, dtype, tiles):
        inputs = make_inputs(SMALL, dtype)
        with torch.no_grad():
            inputs.mask_bias[..., :40] = float("-inf")
        check_against_eager(inputs, "tiled")

    def test_last_tile_dropped_by_a_large_negative(self, dtype, tiles):
        inputs = make_inputs(SMALL, dtype)
        with torch.no_grad():
            inputs.mask_bias[..., 40:] = -3e4
        check_against_eager(inputs, "tiled")

    def test_minus_infinity_in_the_pair_bias(self, dtype, tiles):
        check_against_eager(make_inputs(SMALL, dtype, pair="minus_inf"), "tiled")


@pytest.mark.parametrize(
    "wanted", ["q", "k", "v", "mask_bias", "pair_bias", "gate", "q v", "k pair_bias", "mask_bias pair_bias gate"]
)
def test_a_gradient_alone_equals_the_same_gradient_among_all(wanted, small_tiles):
    inputs = make_inputs(SMALL, gate="contiguous")
    every = run_op(inputs, "tiled")
    for name, tensor in inputs.differentiable().items():
        tensor.requires_grad_(name in wanted.split())
    some = run_op(inputs, "tiled")
    assert set(some.tensors) == {"o", *(f"d{name}" for name in wanted.split())}
    for name, tensor in some.tensors.items():
        assert torch.equal(tensor, every[name]), name


@pytest.fixture
def any_threads():
    """The test sets the number of torch's threads as it likes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=dtype_id)
def test_runs_are_bit_identical(dtype, threads, any_threads):
    shape = AttentionShape("repeat", 2, 9, 130, 700, 4, 32, "several tiles of the real size")
    inputs = make_inputs(shape, dtype, gate="contiguous")
    torch.set_num_threads(threads)
    first = run_op(inputs, "tiled")
    for _ in range(3):
        again = run_op(inputs, "tiled")
        for name, tensor in first.tensors.items():
            assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize(
    "mask, pair", [("additive", "contiguous"), ("bool", "one_head"), ("none", "shared_samples"), ("shared", "none")]
)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_heads_dealt_out_to_workers(threads, mask, pair, any_threads, monkeypatch):
    monkeypatch.setattr(tiled, "MIN_LOGITS_FOR_WORKERS", 1)
    torch.set_num_threads(threads)
    assert_close_to_fp64(make_inputs(SMALL, FP64, mask=mask, pair=pair, gate="contiguous"))


def test_workers_under_inference_mode_and_for_views(any_threads, monkeypatch):
    monkeypatch.setattr(tiled, "MIN_LOGITS_FOR_WORKERS", 1)
    torch.set_num_threads(2)
    shape = AttentionShape("square", 1, 20, 20, 20, 4, 8, "a transposed view needs N = L")
    expected = run_op(make_inputs(shape, FP64), "tiled")
    for layout in LAYOUTS:
        inputs = make_inputs(shape, FP64, layout=layout)
        for name, tensor in run_op(inputs, "tiled").tensors.items():
            torch.testing.assert_close(tensor, expected[name])
        with torch.inference_mode():
            o = evoformer_attention(
                inputs.q, inputs.k, inputs.v, mask_bias=inputs.mask_bias, pair_bias=inputs.pair_bias
            )
            torch.testing.assert_close(o, expected["o"])


def test_bias_gradients_are_summed_in_fp32():
    """Over 512 rows a bf16 sum would lose everything below 1/256 of it."""
    shape = AttentionShape("rows-512", 1, 512, 64, 64, 2, 32, "sum over many rows")
    inputs = make_inputs(shape, BF16, mask="none", pair="fp32")
    actual, reference = run_op(inputs, "tiled")["dpair_bias"].double(), fp64_reference(inputs)["dpair_bias"]
    assert ((actual - reference).norm() / reference.norm()).item() <= 1e-3


class _LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any tensor made inside it has."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_tensor_has_an_element_per_logit(any_threads):
    torch.set_num_threads(1)  # a dispatch mode sees its own thread only
    shape = AttentionShape("long", 1, 2, 1500, 1500, 4, 16, "logits of one row exceed a tile many times")
    inputs = make_inputs(shape, pair="none", gate="contiguous")
    with _LargestTensor() as seen:
        arguments = (inputs.q, inputs.k, inputs.v, inputs.mask_bias, None, inputs.gate)
        with torch.no_grad():
            o, lse = tiled.TILED.forward(*arguments, 0.25)
            tiled.TILED.backward(inputs.do, *arguments, o, lse, 0.25, (True, True, True, True, False, True))
    assert seen.largest <= 2 * tiled.TILE_ELEMENTS_PER_THREAD < shape.logits / 8


def test_lse_of_rows_with_and_without_keys():
    inputs = make_inputs(SMALL, FP64, mask="all_masked")
    with torch.no_grad():
        _, lse = tiled.TILED.forward(*inputs.tensors(), 1.0)
    assert (lse[:, ::2] == float("inf")).all()
    assert torch.isfinite(lse[:, 1::2]).all()


def test_it_runs_every_problem():
    inputs = make_inputs(SMALL)
    assert tiled.TILED.unsupported_reason(problem_of(*inputs.tensors()[:2], inputs.pair_bias, 1.0)) is None


@pytest.mark.parametrize("length, largest", [(1, 512), (8, 8), (9, 8), (513, 512), (5000, 512), (100, 1)])
def test_blocks_cover_the_length_once(length, largest):
    blocks = tiled._blocks(length, largest)
    assert [i for block in blocks for i in range(length)[block]] == list(range(length))
    assert all(block.stop - block.start <= max(8, largest) for block in blocks)

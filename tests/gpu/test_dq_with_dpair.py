# SPDX-License-Identifier: Apache-2.0
"""dQ and d(pair_bias) from one kernel: clusters of every size, which small shapes with few heads do not reach."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.helpers.inputs import make_inputs
from tests.helpers.numerics import check_against_eager, run_op
from tests.helpers.shapes import AttentionShape

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="kernels for sm_90a alone")]
BF16, FP16 = torch.bfloat16, torch.float16
# heads, keys: just enough clusters of 2, 3, 4 and 6 blocks to keep an H100 from idling, with all rows in one share
SIZES = ((20, 250), (12, 300), (9, 512), (5, 700))
ROWS = 13  # more than twice as many as stages, so that every ring and every barrier comes round


def shape_of(heads, keys, head_dim, batch=1):
    return AttentionShape("clusters", batch, ROWS, 300, keys, heads, head_dim, "enough work for clusters")


def kernels_of(inputs) -> str:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_op(inputs, "sm90")
        torch.cuda.synchronize()
    return " ".join(event.key for event in profiler.key_averages())


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_dim", (8, 16, 24, 32))
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"k{sizes[1]}")
def test_every_cluster(sizes, head_dim, dtype):
    inputs = make_inputs(shape_of(*sizes, head_dim), dtype, "cuda", mask="minus_inf")
    assert "dq_dpair" in kernels_of(inputs), "the shape no longer reaches the kernel"
    check_against_eager(inputs, "sm90")


@pytest.mark.parametrize("sizes", SIZES[1::2], ids=lambda sizes: f"k{sizes[1]}")
@pytest.mark.parametrize("pair", ("contiguous", "transposed", "last_heads", "shared_samples", "one_head", "minus_inf"))
@pytest.mark.parametrize("mask", ("none", "all_masked", "additive"))
def test_masks_and_biases(mask, pair, sizes):
    shape = shape_of(*sizes, 32, batch=2)
    check_against_eager(make_inputs(shape, BF16, "cuda", mask=mask, pair=pair), "sm90")


@pytest.mark.parametrize("layout", ("ending_node", "packed_qkv", "heads_first"))
def test_layouts_and_a_gate(layout):
    shape = AttentionShape("square", 1, 130, 130, 130, 20, 32, "a transposed view needs N = Lq")
    inputs = make_inputs(shape, BF16, "cuda", layout=layout, gate="contiguous")
    assert "dq_dpair" in kernels_of(inputs)
    check_against_eager(inputs, "sm90")


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"k{sizes[1]}")
def test_twenty_runs_give_the_same_bits(sizes):
    inputs = make_inputs(shape_of(*sizes, 32), BF16, "cuda", mask="minus_inf")
    first = run_op(inputs, "sm90")
    for _ in range(19):
        again = run_op(inputs, "sm90")
        for name, tensor in first.tensors.items():
            assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("value", (-1e4, -1e9, -1e38))
def test_keys_past_the_end_stay_dropped_beside_large_negatives(value):
    """Their bias reads as zero, which is far above that of a row whose every key has a large negative one."""
    shape = shape_of(*SIZES[0], 32)
    plain, shifted = make_inputs(shape, BF16, "cuda"), make_inputs(shape, BF16, "cuda")
    with torch.no_grad():
        for inputs, constant in ((plain, 0.0), (shifted, value)):
            inputs.pair_bias[..., 3, :] = constant
    expected, actual = run_op(plain, "sm90"), run_op(shifted, "sm90")
    for name, tensor in expected.tensors.items():
        error = (actual[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert error.item() <= 4 * torch.finfo(BF16).eps, name


def test_both_kernels_agree_with_those_that_have_one_output_each():
    inputs = make_inputs(shape_of(*SIZES[2], 32), BF16, "cuda", mask="minus_inf")
    together = run_op(inputs, "sm90")
    inputs.pair_bias = inputs.pair_bias.detach()
    dq = run_op(inputs, "sm90")["dq"]
    inputs.pair_bias.requires_grad_()
    inputs.q = inputs.q.detach()
    dpair_bias = run_op(inputs, "sm90")["dpair_bias"]
    for name, alone in (("dq", dq), ("dpair_bias", dpair_bias)):
        error = (together[name].double() - alone.double()).norm() / alone.double().norm()
        assert error.item() <= torch.finfo(BF16).eps, name

# SPDX-License-Identifier: Apache-2.0
"""dQ, dK and dV from one kernel, which takes enough rows and heads to fill the GPU; small shapes do not reach it."""

import pytest
import torch

from tests.helpers.inputs import make_inputs
from tests.helpers.numerics import check_against_eager, run_op
from tests.helpers.shapes import AttentionShape

from .runs import launches

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not IS_HOPPER, reason="kernels for sm_90a alone")]
BF16, FP16 = torch.bfloat16, torch.float16
# Three warpgroups with keys and four; one pass over the keys, two, and several; warpgroups without keys in the last.
KEYS = (180, 250, 321, 512, 700)
HEADS = 10
# As many work items as multiprocessors, nearly.
ROWS = (torch.cuda.get_device_properties(0).multi_processor_count if IS_HOPPER else 132) // HEADS


def filled(head_dims):
    """Above head dim 32 there are always three warpgroups, of which 250 keys would leave two of six idle."""
    return [(keys, dim) for keys in KEYS for dim in head_dims if not (dim > 32 and keys == 250)]


def shape_of(keys, head_dim, batch=1, rows=ROWS, queries=300):
    return AttentionShape(
        "filled", batch, rows, queries, keys, HEADS, head_dim, "enough rows and heads for one kernel"
    )


def reaches(inputs) -> bool:
    """Whether the backward pass takes the kernel that this file is about."""
    return launches(inputs, "bwd_dqkv") > 0


def check(inputs):
    assert reaches(inputs), "the shape no longer reaches the kernel"
    check_against_eager(inputs, "sm90")


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize(("keys", "head_dim"), filled((8, 16, 24, 32, 40, 64)))
def test_every_number_of_passes(keys, head_dim, dtype):
    check(make_inputs(shape_of(keys, head_dim), dtype, "cuda", mask="minus_inf"))


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("keys", (180, 700))
@pytest.mark.parametrize(
    "pair", ("none", "contiguous", "transposed", "last_heads", "shared_samples", "one_head", "minus_inf")
)
@pytest.mark.parametrize("mask", ("none", "all_masked", "additive"))
def test_masks_and_biases(mask, pair, keys, dtype):
    check(make_inputs(shape_of(keys, 32, batch=2), dtype, "cuda", mask=mask, pair=pair))


@pytest.mark.parametrize("queries", (1, 33, 64, 129))
@pytest.mark.parametrize("head_dim", (16, 32, 64))
def test_few_queries_and_more_items_than_blocks(head_dim, queries):
    check(make_inputs(shape_of(391, head_dim, rows=4 * ROWS, queries=queries), BF16, "cuda", mask="additive"))


@pytest.mark.parametrize("head_dim", (16, 32, 64))
@pytest.mark.parametrize("layout", ("ending_node", "packed_qkv", "heads_first"))
def test_layouts_and_a_gate(layout, head_dim):
    shape = AttentionShape("square", 1, 130, 130, 130, 20, head_dim, "a transposed view needs N = Lq")
    check(make_inputs(shape, BF16, "cuda", layout=layout, gate="contiguous"))


def test_rows_before_heads():
    """The order of work where the bias of all heads, over 24 MiB, would not stay in L2."""
    check(make_inputs(shape_of(1300, 16, queries=1100), BF16, "cuda", mask="additive"))


@pytest.mark.parametrize(("keys", "head_dim"), filled((16, 32, 64)))
def test_twenty_runs_give_the_same_bits(keys, head_dim):
    inputs = make_inputs(shape_of(keys, head_dim), BF16, "cuda", mask="minus_inf")
    assert reaches(inputs)
    first = run_op(inputs, "sm90")
    for _ in range(19):
        again = run_op(inputs, "sm90")
        for name, tensor in first.tensors.items():
            assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("head_dim", (16, 32, 64))
def test_a_cuda_graph_replays_it(head_dim):
    inputs = make_inputs(shape_of(512, head_dim), BF16, "cuda", mask="minus_inf")
    assert reaches(inputs)
    expected = run_op(inputs, "sm90")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_op(inputs, "sm90")
    for _ in range(2):
        for tensor in captured.tensors.values():
            tensor.detach().fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for name, tensor in expected.tensors.items():
            assert torch.equal(captured[name], tensor), name


@pytest.mark.parametrize("keys", (180, 250, 700))
@pytest.mark.parametrize("value", (-1e4, -1e9, -1e38))
def test_keys_past_the_end_stay_dropped_beside_large_negatives(value, keys):
    """Their bias reads as zero, which is far above that of a row whose every key has a large negative one."""
    shape = shape_of(keys, 32)
    plain, shifted = make_inputs(shape, BF16, "cuda"), make_inputs(shape, BF16, "cuda")
    assert reaches(plain)
    with torch.no_grad():
        for inputs, constant in ((plain, 0.0), (shifted, value)):
            inputs.pair_bias[..., 3, :] = constant
    expected, actual = run_op(plain, "sm90"), run_op(shifted, "sm90")
    for name, tensor in expected.tensors.items():
        error = (actual[name].double() - tensor.double()).norm() / tensor.double().norm()
        assert error.item() <= 4 * torch.finfo(BF16).eps, name


@pytest.mark.parametrize("head_dim", (16, 32, 64))
def test_one_kernel_agrees_with_two(head_dim):
    inputs = make_inputs(shape_of(512, head_dim), BF16, "cuda", mask="minus_inf")
    assert reaches(inputs)
    together = run_op(inputs, "sm90")
    inputs.k, inputs.v = inputs.k.detach(), inputs.v.detach()
    assert not reaches(inputs)
    dq = run_op(inputs, "sm90")["dq"]
    inputs.k.requires_grad_()
    inputs.v.requires_grad_()
    inputs.q = inputs.q.detach()
    assert not reaches(inputs)
    others = run_op(inputs, "sm90")
    for name, alone in (("dq", dq), ("dk", others["dk"]), ("dv", others["dv"])):
        error = (together[name].double() - alone.double()).norm() / alone.double().norm()
        assert error.item() <= torch.finfo(BF16).eps, name

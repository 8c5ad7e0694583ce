# SPDX-License-Identifier: Apache-2.0
"""The forward whose warpgroups have two rows each; other numbers of rows with the same bias do not reach it."""

import pytest
import torch

from tests.helpers.inputs import make_inputs
from tests.helpers.numerics import check_against_eager
from tests.helpers.shapes import AttentionShape

from .runs import ON_HOPPER, launches

pytestmark = [pytest.mark.gpu, ON_HOPPER]
BF16, FP16 = torch.bfloat16, torch.float16
# A full block; one and two rows missing from the last one, of two blocks and of three; more than three blocks.
ROWS = (4, 7, 8, 10, 11, 35)


def shape_of(rows, head_dim, batch=1, queries=200, keys=150, heads=3):
    return AttentionShape("two-rows", batch, rows, queries, keys, heads, head_dim, "tails of queries and keys")


def check(inputs):
    assert launches(inputs, "fwd_two_row"), "not the kernel that is tested"
    check_against_eager(inputs, "sm90")


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("head_dim", (5, 8, 16, 24, 32))
@pytest.mark.parametrize("rows", ROWS)
def test_rows_and_head_dims(rows, head_dim, dtype):
    check(make_inputs(shape_of(rows, head_dim), dtype, "cuda", mask="minus_inf"))


@pytest.mark.parametrize("dtype", (BF16, FP16))
@pytest.mark.parametrize("pair", ("contiguous", "transposed", "last_heads", "shared_samples", "one_head", "minus_inf"))
@pytest.mark.parametrize("mask", ("none", "all_masked", "additive"))
def test_masks_and_biases(mask, pair, dtype):
    check(make_inputs(shape_of(11, 32, batch=2), dtype, "cuda", mask=mask, pair=pair))


@pytest.mark.parametrize("head_dim", (16, 32))
@pytest.mark.parametrize("layout", ("contiguous", "ending_node", "packed_qkv", "heads_first"))
def test_layouts_and_a_gate(layout, head_dim):
    shape = shape_of(11, head_dim, keys=200)
    check(make_inputs(shape, BF16, "cuda", mask="additive", layout=layout, gate="contiguous"))


@pytest.mark.parametrize("head_dim", (16, 32))
@pytest.mark.parametrize(("queries", "keys"), ((1, 1), (1, 65), (64, 64), (65, 128), (129, 31), (130, 700)))
def test_lengths(queries, keys, head_dim):
    check(make_inputs(shape_of(8, head_dim, queries=queries, keys=keys), BF16, "cuda", mask="minus_inf"))


@pytest.mark.parametrize("head_dim", (16, 32))
def test_more_items_than_buffers(head_dim):
    """A block takes several work items in turn, so that both of its buffers of operands are filled again."""
    check(make_inputs(shape_of(400, head_dim, queries=40, keys=40, heads=8), BF16, "cuda", mask="minus_inf"))

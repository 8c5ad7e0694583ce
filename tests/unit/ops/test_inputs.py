# SPDX-License-Identifier: Apache-2.0
"""The inputs that tests are made of: layouts and biases are what their names say."""

import pytest
import torch

from tests.helpers import shapes
from tests.helpers.inputs import GATE_KINDS, LAYOUTS, MASK_KINDS, PAIR_KINDS, make_inputs, repeated_axes
from tests.helpers.shapes import AttentionShape

SHAPE = AttentionShape("inputs", 2, 4, 5, 6, 3, 8, "no two axes alike")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_values(layout):
    plain, laid_out = make_inputs(SHAPE), make_inputs(SHAPE, layout=layout)
    for expected, actual in zip((*plain.tensors()[:5], plain.do), (*laid_out.tensors()[:5], laid_out.do), strict=True):
        assert torch.equal(actual, expected)
    assert laid_out.q.is_contiguous() == (layout == "contiguous")
    assert (laid_out.q.stride(-1) == 1) == (layout != "strided_last")


@pytest.mark.parametrize("layout, is_aligned", [("unaligned", False), ("packed_qkv", True), ("ending_node", True)])
def test_alignment_to_16_bytes(layout, is_aligned):
    q = make_inputs(SHAPE, torch.bfloat16, layout=layout).q
    in_bytes = [q.data_ptr(), *(stride * q.element_size() for stride in q.stride()[:-1])]
    assert all(n % 16 == 0 for n in in_bytes) == is_aligned


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_masks(kind):
    mask = make_inputs(SHAPE, torch.bfloat16, mask=kind).mask_bias
    if kind == "none":
        assert mask is None
        return
    assert mask.shape == ((1, 1, 1, 1, 6) if kind == "shared" else (2, 4, 1, 1, 6))
    assert mask.dtype == {"bool": torch.bool, "fp32": torch.float32}.get(kind, torch.bfloat16)
    assert mask.requires_grad == (kind != "bool")
    assert (repeated_axes(mask) == (1,)) == (kind == "expanded")
    rows_without_keys = (mask == float("-inf")).all(dim=-1).any()
    assert rows_without_keys == (kind == "all_masked")


@pytest.mark.parametrize("kind", PAIR_KINDS)
def test_pair_biases(kind):
    pair = make_inputs(SHAPE, torch.bfloat16, pair=kind).pair_bias
    if kind == "none":
        assert pair is None
        return
    rows = 4 if kind in ("expanded", "per_row") else 1
    assert pair.shape == (1 if kind == "shared_samples" else 2, rows, 1 if kind == "one_head" else 3, 5, 6)
    assert pair.dtype == (torch.float32 if kind == "fp32" else torch.bfloat16)
    assert pair.is_contiguous() == (kind not in ("transposed", "last_heads", "expanded"))


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_gates(kind):
    shape = AttentionShape("square", 2, 5, 5, 6, 3, 8, "a transposed view needs N = Lq")
    inputs = make_inputs(shape, torch.bfloat16, gate=kind)
    gate = inputs.gate
    assert (gate.shape, gate.dtype, gate.stride(-1)) == (inputs.q.shape, torch.bfloat16, 1)
    assert gate.is_contiguous() == (kind not in ("transposed", "unaligned"))
    assert (torch.sigmoid(gate) == 1).all() == (kind == "open")
    assert (torch.sigmoid(gate.float()) == 0).any() == (kind == "closed")
    assert set(inputs.differentiable()) == {"q", "k", "v", "mask_bias", "pair_bias", "gate"}


def test_the_shape_decides_the_pair_bias_it_is_used_with():
    small = {shape.name: shape for shape in shapes.SMALL_USES}
    assert make_inputs(small["small-msa-column"]).pair_bias is None
    assert make_inputs(small["small-diffusion"]).pair_bias.shape[0] == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layout": "blocked"}, "layout must be one of contiguous, .* got 'blocked'"),
        ({"mask": "some"}, "mask must be one of none, .* got 'some'"),
        ({"pair": "some"}, "pair must be one of none, .* got 'some'"),
        ({"gate": "some"}, "gate must be one of contiguous, .* got 'some'"),
    ],
)
def test_unknown_kinds_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_inputs(SHAPE, **wrong)


def test_the_same_seed_gives_the_same_numbers():
    assert torch.equal(make_inputs(SHAPE, seed=3).q, make_inputs(SHAPE, seed=3).q)
    assert not torch.equal(make_inputs(SHAPE, seed=3).q, make_inputs(SHAPE, seed=4).q)


def test_names_of_shapes_are_unique():
    for group in (shapes.USES, shapes.BOUNDARY, shapes.SMALL_USES, shapes.LENGTHS, shapes.TAILS):
        assert len({shape.name for shape in group}) == len(group)
    assert set(shapes.BARS) <= set(shapes.USES)
    assert all(shape.source for shape in shapes.USES)

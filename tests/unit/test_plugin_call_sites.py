# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's import path as models use it: what its own unit test covers, and how OpenFold calls it."""

import pytest
import torch

from deepspeed_ds4sci import plugin
from tests.helpers.inputs import make_inputs
from tests.helpers.numerics import assert_no_worse_than_eager, eager_results, fp64_reference, run
from tests.helpers.shapes import AttentionShape

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def op():
    plugin.enable()
    from deepspeed.ops.deepspeed4science import DS4Sci_EvoformerAttention

    return DS4Sci_EvoformerAttention


@pytest.fixture
def attention(op):
    """The op with the keywords of ours."""

    def call(q, k, v, *, mask_bias=None, pair_bias=None):
        return op(q, k, v, [mask_bias, pair_bias])

    return call


def check(attention, inputs):
    results, reference, eager = run(attention, inputs), fp64_reference(inputs), eager_results(inputs)
    assert set(results.tensors) == set(reference.tensors)
    for name in reference.tensors:
        assert_no_worse_than_eager(name, results[name], eager[name], reference[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 256, 256, 4, 32), (1, 512, 256, 8, 8)], ids=["triangle", "narrow_heads"])
@pytest.mark.parametrize("mask", ["additive", "padded"])
def test_shapes_of_deepspeeds_own_test(attention, device, dtype, sizes, mask):
    """Its two shapes with random biases and with a 0 / large-negative mask; on the CPU with fewer rows."""
    batch, rows, length, heads, head_dim = sizes
    shape = AttentionShape(
        "deepspeed", batch, rows if device == "cuda" else 4, length, length, heads, head_dim, "DeepSpeed"
    )
    check(attention, make_inputs(shape, dtype, device, mask=mask, pair="contiguous"))


def test_availability_as_that_test_asks_for_it():
    """It skips itself unless the op counts as available: with us it does, on every machine."""
    plugin.enable()
    import deepspeed
    from deepspeed.ops.op_builder import EvoformerAttnBuilder

    assert deepspeed.ops.__compatible_ops__[EvoformerAttnBuilder.NAME] is True


SHAPE = AttentionShape("call_site", 2, 6, 40, 40, 4, 16, "a small one")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["heads_first", "ending_node"])
def test_transposed_views(attention, device, layout):
    """OpenFold keeps heads before residues, and its ending-node attention is a transposed view."""
    check(attention, make_inputs(SHAPE, torch.bfloat16, device, layout=layout, pair="transposed"))


@pytest.mark.parametrize("device", DEVICES)
def test_chunked_rows_with_an_expanded_pair_bias(op, device):
    """OpenFold's chunking repeats the pair bias over the rows of each chunk, as a view."""
    inputs = make_inputs(SHAPE, torch.float32, device, pair="contiguous")
    whole = op(inputs.q, inputs.k, inputs.v, [inputs.mask_bias, inputs.pair_bias])
    chunks = []
    for start in range(0, SHAPE.rows, 4):
        q, k, v, mask_bias = (x[:, start : start + 4] for x in inputs.tensors()[:4])
        repeated = inputs.pair_bias.expand(-1, q.shape[1], -1, -1, -1)
        chunks.append(op(q, k, v, [mask_bias, repeated]))
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole)


@pytest.mark.parametrize("device", DEVICES)
def test_summed_output(op, device):
    """o.sum().backward() brings a gradient whose strides are all zero."""
    inputs = make_inputs(SHAPE, torch.float32, device, pair="contiguous")
    q, k, v, mask_bias, pair_bias, _ = inputs.tensors()
    summed = torch.autograd.grad(op(q, k, v, [mask_bias, pair_bias]).sum(), [q, k, v, pair_bias])
    ones = torch.ones_like(q)
    plain = torch.autograd.grad(op(q, k, v, [mask_bias, pair_bias]), [q, k, v, pair_bias], ones)
    torch.testing.assert_close(summed, plain)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_callers_list_is_left_alone(op, count):
    inputs = make_inputs(SHAPE, torch.float32, pair="contiguous")
    biases = [inputs.mask_bias, inputs.pair_bias][:count]
    op(inputs.q, inputs.k, inputs.v, biases)
    assert len(biases) == count

# SPDX-License-Identifier: Apache-2.0
"""Every module against the algorithm written down naively, in fp64: values and gradients."""

import pytest
import torch

from deepspeed_ds4sci import nn as ds4sci_nn
from deepspeed_ds4sci.nn.attention import GatedAttention
from tests.unit.nn import naive_evoformer as naive
from tests.unit.nn.helpers import C_M, C_Z, HEADS_MSA, HEADS_PAIR, make_block, make_inputs, make_stack, randomise

TOLERANCE = dict(rtol=1e-9, atol=1e-11)
TILED = dict(implementation="tiled")

CASES = {
    "msa_row": (
        lambda: ds4sci_nn.MSARowAttentionWithPairBias(C_M, C_Z, 4, HEADS_MSA, **TILED),
        lambda module, m, z, mm, pm: module(m, z, mm),
        lambda p, m, z, mm, pm: naive.msa_row_attention(p, m, z, mm, HEADS_MSA),
    ),
    "msa_column": (
        lambda: ds4sci_nn.MSAColumnAttention(C_M, 4, HEADS_MSA, **TILED),
        lambda module, m, z, mm, pm: module(m, mm),
        lambda p, m, z, mm, pm: naive.msa_column_attention(p, m, mm, HEADS_MSA),
    ),
    "triangle_start": (
        lambda: ds4sci_nn.TriangleAttentionStartingNode(C_Z, 3, HEADS_PAIR, **TILED),
        lambda module, m, z, mm, pm: module(z, pm),
        lambda p, m, z, mm, pm: naive.triangle_attention(p, z, pm, HEADS_PAIR, starting=True),
    ),
    "triangle_end": (
        lambda: ds4sci_nn.TriangleAttentionEndingNode(C_Z, 3, HEADS_PAIR, **TILED),
        lambda module, m, z, mm, pm: module(z, pm),
        lambda p, m, z, mm, pm: naive.triangle_attention(p, z, pm, HEADS_PAIR, starting=False),
    ),
    "outer_product_mean": (
        lambda: ds4sci_nn.OuterProductMean(C_M, C_Z, 5),
        lambda module, m, z, mm, pm: module(m, mm),
        lambda p, m, z, mm, pm: naive.outer_product_mean(p, m, mm),
    ),
    "triangle_mul_out": (
        lambda: ds4sci_nn.TriangleMultiplicationOutgoing(C_Z, 6),
        lambda module, m, z, mm, pm: module(z, pm),
        lambda p, m, z, mm, pm: naive.triangle_multiplication(p, z, pm, outgoing=True),
    ),
    "triangle_mul_in": (
        lambda: ds4sci_nn.TriangleMultiplicationIncoming(C_Z, 6),
        lambda module, m, z, mm, pm: module(z, pm),
        lambda p, m, z, mm, pm: naive.triangle_multiplication(p, z, pm, outgoing=False),
    ),
    "transition": (
        lambda: ds4sci_nn.Transition(C_M, 2),
        lambda module, m, z, mm, pm: module(m, mm),
        lambda p, m, z, mm, pm: naive.transition(p, m, mm),
    ),
}


def params_of(module):
    return dict(module.named_parameters())


def gradients(output, tensors):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=output.dtype)
    return torch.autograd.grad((output * weights).sum(), tensors, allow_unused=True)


def assert_all_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        if a is None or b is None:
            assert a is None and b is None
        else:
            torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "no_mask"])
@pytest.mark.parametrize("case", CASES)
def test_module_equals_the_algorithm_in_values_and_gradients(case, masked):
    make, call, algorithm = CASES[case]
    module = randomise(make().double())
    m, z, msa_mask, pair_mask = make_inputs()
    tensors = [m.requires_grad_(), z.requires_grad_(), *module.parameters()]
    ones = (torch.ones_like(msa_mask), torch.ones_like(pair_mask))
    actual = call(module, m, z, *((msa_mask, pair_mask) if masked else (None, None)))
    expected = algorithm(params_of(module), m, z, *((msa_mask, pair_mask) if masked else ones))
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    assert_all_close(gradients(actual, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("opm_first", [False, True])
def test_block_equals_the_algorithms(opm_first):
    block = make_block(opm_first=opm_first).eval()
    m, z, msa_mask, pair_mask = make_inputs()
    tensors = [m.requires_grad_(), z.requires_grad_(), *block.parameters()]
    actual = block(m, z, msa_mask, pair_mask)
    expected = naive.evoformer_block(
        params_of(block), m, z, msa_mask, pair_mask, HEADS_MSA, HEADS_PAIR, opm_first=opm_first
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    joined = [torch.cat([out.flatten() for out in outputs]) for outputs in (actual, expected)]
    assert_all_close(gradients(joined[0], tensors), gradients(joined[1], tensors))


def test_stack_chains_blocks_and_reads_the_single_representation_from_the_first_sequence():
    stack = make_stack(num_blocks=2).eval()
    m, z, msa_mask, pair_mask = make_inputs()
    actual = stack(m, z, msa_mask, pair_mask)
    for block in stack.blocks:
        m, z = naive.evoformer_block(params_of(block), m, z, msa_mask, pair_mask, HEADS_MSA, HEADS_PAIR)
    single = naive.linear(params_of(stack), "linear", m[0])
    for a, b in zip(actual, (m, z, single), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_stack_without_c_s_gives_no_single_representation():
    stack = make_stack(num_blocks=1, c_s=None)
    assert stack(*make_inputs()[:2])[2] is None


@pytest.mark.parametrize("batch", [(2,), (2, 3), (0,)], ids=str)
def test_leading_axes_are_batch(batch):
    block = make_block().eval()
    m, z, msa_mask, pair_mask = make_inputs(batch=batch)
    got_m, got_z = block(m, z, msa_mask, pair_mask)
    assert got_m.shape == m.shape and got_z.shape == z.shape
    for index in torch.cartesian_prod(*(torch.arange(n) for n in batch)).reshape(-1, len(batch)).tolist():
        one = tuple(index)
        want_m, want_z = block(m[one], z[one], msa_mask[one], pair_mask[one])
        torch.testing.assert_close(got_m[one], want_m, **TOLERANCE)
        torch.testing.assert_close(got_z[one], want_z, **TOLERANCE)


def test_bool_and_float_masks_are_the_same():
    block = make_block().eval()
    m, z, msa_mask, pair_mask = make_inputs()
    for a, b in zip(block(m, z, msa_mask, pair_mask), block(m, z, msa_mask.bool(), pair_mask.bool()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_ending_node_is_the_starting_node_on_the_transposed_pair_representation():
    start = randomise(ds4sci_nn.TriangleAttentionStartingNode(C_Z, 3, HEADS_PAIR, **TILED).double())
    end = ds4sci_nn.TriangleAttentionEndingNode(C_Z, 3, HEADS_PAIR, **TILED).double()
    end.load_state_dict(start.state_dict())
    _, z, _, pair_mask = make_inputs(n_res=7)
    expected = start(z.transpose(0, 1), pair_mask.T).transpose(0, 1)
    torch.testing.assert_close(end(z, pair_mask), expected, **TOLERANCE)
    assert not torch.allclose(end(z, pair_mask), start(z, pair_mask))


@pytest.mark.parametrize("case", ["triangle_end", "msa_column"])
def test_attention_along_rows_hands_views_to_the_op(case, monkeypatch):
    seen = {}

    def record(q, k, v, *, gate, **biases):
        seen.update(q=q, k=k, v=v, gate=gate)
        return torch.zeros_like(q, memory_format=torch.contiguous_format)

    monkeypatch.setattr("deepspeed_ds4sci.nn.attention.evoformer_attention", record)
    make, call, _ = CASES[case]
    call(make().double(), *make_inputs(n_seq=3, n_res=6))
    for name, tensor in seen.items():
        assert tensor.stride(-1) == 1, name
        assert tensor.transpose(1, 2).is_contiguous() and not tensor.is_contiguous(), name


@pytest.mark.parametrize("attend_rows", [False, True])
def test_attention_keeps_q_k_v_gate_and_one_output(attend_rows):
    """The op and the projection after it share the gated output; nobody keeps the ungated one or the sigmoid."""
    module = GatedAttention(12, 4, 2, **TILED)
    x = torch.randn(1, 5, 7, 12, requires_grad=True)
    kept = set()

    def note(tensor):
        if tensor.numel() == 5 * 7 * 4 * 2:
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        update = module(x, attend_rows=attend_rows)
    assert len(kept) == 5
    assert update.shape == x.shape


def test_implementation_is_passed_on_to_every_attention(monkeypatch):
    names = []

    def record(q, k, v, *, implementation, **biases):
        names.append(implementation)
        return torch.zeros_like(q, memory_format=torch.contiguous_format)

    monkeypatch.setattr("deepspeed_ds4sci.nn.attention.evoformer_attention", record)
    make_block(implementation="reference")(*make_inputs())
    assert names == ["reference"] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_stays_near_fp64(dtype):
    block = make_block().eval()
    inputs = make_inputs(n_seq=6, n_res=9)
    expected = block(*inputs)
    actual = block.to(dtype)(*(x.to(dtype) for x in inputs))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        error = (a.double() - b).square().mean().sqrt() / b.square().mean().sqrt()
        assert error < 10 * torch.finfo(dtype).eps


def test_autocast_runs_and_counts_sequences_exactly():
    block = make_block(torch.float32).eval()
    m, z, msa_mask, pair_mask = make_inputs(n_seq=300, n_res=3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update = block.outer_product_mean(m, torch.ones_like(msa_mask))
        unmasked = block.outer_product_mean(m)
        got = block(m, z, msa_mask, pair_mask)
    # 300 is no bf16 number: counted in bf16 the two would differ.
    torch.testing.assert_close(update, unmasked, rtol=0, atol=0)
    assert all(torch.isfinite(x).all() for x in got)

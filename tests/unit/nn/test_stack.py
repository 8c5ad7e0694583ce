# SPDX-License-Identifier: Apache-2.0
"""Initialisation, dropout, checkpointing, compilation, inference memory, argument errors."""

import math
from pathlib import Path

import pytest
import torch

from deepspeed_ds4sci.nn import (
    EvoformerBlock,
    EvoformerStack,
    MSAColumnAttention,
    OuterProductMean,
    Transition,
    primitives,
)
from deepspeed_ds4sci.nn.primitives import Linear, SharedDropout
from tests.unit.nn.helpers import C_M, C_Z, SIZES, make_block, make_inputs, make_stack, randomise


def test_a_fresh_block_is_the_identity():
    block = EvoformerBlock(C_M, C_Z, **SIZES).double()
    m, z, msa_mask, pair_mask = make_inputs()
    got_m, got_z = block(m, z, msa_mask, pair_mask)
    assert torch.equal(got_m, m) and torch.equal(got_z, z)


@pytest.mark.parametrize(
    "init, std, bias",
    [("lecun", 1 / 16, 0), ("relu", math.sqrt(2) / 16, 0), ("glorot", math.sqrt(2 / 768), 0), ("normal", 1 / 16, 0)],
)
def test_initial_weights_have_the_stated_spread(init, std, bias):
    layer = Linear(256, 512, init=init)
    assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
    assert layer.weight.mean().item() == pytest.approx(0.0, abs=std / 100)
    assert (layer.bias == bias).all()
    if init in ("lecun", "relu"):
        assert layer.weight.abs().max().item() <= 2 * std / 0.8796 + 1e-6


@pytest.mark.parametrize("init, bias", [("gating", 1.0), ("final", 0.0)])
def test_gates_and_final_layers_start_at_zero_weight(init, bias):
    layer = Linear(3, 4, init=init)
    assert (layer.weight == 0).all() and (layer.bias == bias).all()


def test_which_layers_start_at_zero():
    block = EvoformerBlock(C_M, C_Z, **SIZES)
    zero = {name for name, value in block.named_parameters() if name.endswith("weight") and (value == 0).all()}
    endings = ("linear_o", "linear_g", "linear_out", "linear_2", "_a_g", "_b_g", "tri_mul_out.linear_z", "in.linear_z")
    endings = tuple(f"{ending}.weight" for ending in endings)
    expected = {n for n in block.state_dict() if n.endswith(endings) and n != "outer_product_mean.linear_2.weight"}
    assert zero == expected


def test_modules_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        stack = EvoformerStack(1, C_M, C_Z, **SIZES)
    assert all(value.is_meta for value in stack.state_dict().values())


def test_unknown_init_is_refused():
    with pytest.raises(ValueError, match="init must be one of lecun, .*, got 'zeros'"):
        Linear(2, 2, init="zeros")


@pytest.mark.parametrize("shared_dim", [-3, -2])
def test_dropout_drops_whole_rows_or_columns_of_a_channel(shared_dim):
    x = torch.ones(2, 40, 50, 8)
    dropped = SharedDropout(0.25, shared_dim)(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    first = dropped.select(shared_dim, 0).unsqueeze(shared_dim)
    assert torch.equal(dropped, first.expand_as(dropped))
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.1)
    other = -5 - shared_dim
    assert not torch.equal(dropped, dropped.select(other, 0).unsqueeze(other).expand_as(dropped))


def test_dropout_is_off_in_evaluation_and_checked():
    x = torch.ones(2, 3, 4)
    assert SharedDropout(0.5, -3).eval()(x) is x
    with pytest.raises(ValueError, match=r"p must be a dropout probability in \[0, 1\), got 1.0"):
        SharedDropout(1.0, -3)


def test_block_drops_rows_for_the_alignment_and_columns_for_the_ending_node(monkeypatch):
    block = make_block(msa_dropout=0.5, pair_dropout=0.5)
    shared = {}
    forward = SharedDropout.forward

    def record(self, x):
        shared.setdefault(id(self), []).append(self.shared_dim)
        return forward(self, x)

    monkeypatch.setattr(SharedDropout, "forward", record)
    block(*make_inputs())
    assert shared[id(block.msa_dropout)] == [-3]
    assert shared[id(block.pair_stack.dropout_row)] == [-3] * 3
    assert shared[id(block.pair_stack.dropout_column)] == [-2]


def loss_and_gradients(stack, inputs):
    torch.manual_seed(3)
    m, z, s = stack(*inputs)
    loss = m.square().mean() + z.square().mean() + s.square().mean()
    return loss, torch.autograd.grad(loss, list(stack.parameters()), allow_unused=True)


def test_checkpointing_changes_nothing_with_dropout_on():
    plain, recomputed = make_stack(), make_stack(checkpoint_blocks=True)
    loss, gradients = loss_and_gradients(plain, make_inputs())
    loss_again, gradients_again = loss_and_gradients(recomputed, make_inputs())
    assert torch.equal(loss, loss_again)
    for a, b in zip(gradients, gradients_again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept_bytes(stack):
        seen = {}

        def pack(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            stack(*make_inputs(n_seq=8, n_res=12))
        return sum(seen.values())

    assert kept_bytes(make_stack(3, checkpoint_blocks=True)) < kept_bytes(make_stack(3)) / 4


def test_checkpointing_is_skipped_without_gradients(monkeypatch):
    monkeypatch.setattr("deepspeed_ds4sci.nn.evoformer.checkpoint", None)
    with torch.no_grad():
        make_stack(checkpoint_blocks=True)(*make_inputs())


@pytest.mark.parametrize("masked", [True, False])
def test_a_block_compiles_without_a_graph_break(masked):
    block = make_block(torch.float32).eval()
    inputs = make_inputs(dtype=torch.float32)
    inputs = inputs if masked else inputs[:2]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    got, want = compiled(*inputs), block(*inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    parameters = list(block.parameters())
    gradients = [torch.autograd.grad(m.sum() + z.square().sum(), parameters) for m, z in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [1, 1000, 3000])
def test_slices_at_inference_change_nothing(limit, monkeypatch):
    stack = make_stack().eval()
    inputs = make_inputs(n_seq=7, n_res=9, batch=(2,))
    want = stack(*inputs)
    monkeypatch.setattr(primitives, "MAX_INFERENCE_ELEMENTS", limit)
    with torch.no_grad():
        got = stack(*inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "make, shape",
    [
        (lambda: OuterProductMean(4, 3, 5), (2, 30, 4)),
        (lambda: Transition(4, 8), (30, 6, 4)),
    ],
)
def test_wide_intermediates_stay_under_the_limit_at_inference(make, shape, monkeypatch):
    limit = 24 * 25 * 4
    monkeypatch.setattr(primitives, "MAX_INFERENCE_ELEMENTS", limit)
    module = make()
    widest = []
    wide = module.linear_out if isinstance(module, OuterProductMean) else module.linear_2
    wide.register_forward_pre_hook(lambda _, args: widest.append(args[0].numel()))
    with torch.no_grad():
        module(torch.randn(shape))
    assert len(widest) > 1 and max(widest) <= limit
    module(torch.randn(shape))
    assert widest[-1] > limit


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "child, last_layer, counted",
    [
        ("msa_att_row", "mha.linear_o", 5),
        ("msa_att_col", "_msa_att.mha.linear_o", 5),
        ("pair_stack.tri_att_end", "mha.linear_o", 5),
        ("pair_stack.tri_mul_in", "linear_z", 4),
    ],
)
def test_rows_come_in_slices_at_inference(child, last_layer, counted, masked, monkeypatch):
    module = make_block().get_submodule(child)
    m, z, msa_mask, pair_mask = make_inputs(n_seq=12, n_res=12)
    inputs = (m, z) if child == "msa_att_row" else (m,) if child == "msa_att_col" else (z,)
    mask = (msa_mask if child.startswith("msa") else pair_mask) if masked else None
    want = module(*inputs, mask)
    widest = []
    last = module.get_submodule(last_layer)
    last.register_forward_pre_hook(lambda _, args: widest.append(args[0].numel()))
    # Four slices of three rows.
    monkeypatch.setattr(primitives, "MAX_INFERENCE_ELEMENTS", counted * 12 * 12 * last.in_features // 4)
    with torch.no_grad():
        got = module(*inputs, mask)
    assert widest == [3 * 12 * last.in_features] * 4
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    assert got.is_contiguous()


def peak_growth_mib(function):
    """MiB by which resident memory peaks above where it was."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_mib("VmRSS")
    function()
    return _status_mib("VmHWM") - before


def _status_mib(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs")
def test_five_thousand_sequences_at_inference_take_memory_linear_in_their_number():
    module = randomise(MSAColumnAttention(16, 8, 2, implementation="tiled")).eval()
    m = torch.randn(1, 5120, 2, 16)
    with torch.no_grad():
        # The logits alone would be 2 residues x 2 heads x 5120^2 fp32 = 400 MiB; the reference shows the ruler works.
        assert peak_growth_mib(lambda: module(m)) < 100
        module._msa_att.mha.implementation = "reference"
        assert peak_growth_mib(lambda: module(m)) > 400


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda b, m, z, mm, pm: b(m[..., :5], z),
            r"m must be \[\*, n_seq, n_res, c_m\] with 12 channels, got shape \[4, 5, 5\]",
        ),
        (lambda b, m, z, mm, pm: b(m[0], z), r"m must be .* got shape \[5, 12\]"),
        (
            lambda b, m, z, mm, pm: b(m, z[..., :3]),
            r"z must be \[\*, n_res, n_res, c_z\] with 8 channels, got shape \[5, 5, 3\]",
        ),
        (lambda b, m, z, mm, pm: b(m, z[:3]), r"z must be square, .* got shape \[3, 5, 8\]"),
        (
            lambda b, m, z, mm, pm: b(m, z[:3, :3]),
            r"z must be \[\*, n_res, n_res, c_z\] = \[5, 5, 8\] to fit m, got shape \[3, 3, 8\]",
        ),
        (lambda b, m, z, mm, pm: b(m, z, mm[:2]), r"mask must be \[4, 5\] \(keep = 1\), got shape \[2, 5\]"),
        (lambda b, m, z, mm, pm: b(m, z, mm, pm[:2]), r"mask must be \[5, 5\] \(keep = 1\), got shape \[2, 5\]"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_block(), *make_inputs())


def test_a_stack_needs_a_block():
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        EvoformerStack(0, C_M, C_Z)

# SPDX-License-Identifier: Apache-2.0
"""The public op: every error message, empty tensors, and the forms of the pair bias it brings to the canonical one."""

import logging
import re

import pytest
import torch

from deepspeed_ds4sci.ops import _custom_op, _dispatch
from deepspeed_ds4sci.ops import evoformer_attention as entry
from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention, without_repeats
from tests.helpers.inputs import make_inputs, repeated_axes
from tests.helpers.numerics import run_op
from tests.helpers.shapes import AttentionShape

SHAPE = AttentionShape("public", 2, 3, 5, 7, 4, 8, "no two axes alike")


def arguments(**changes):
    named = make_inputs(SHAPE).named()
    return {name: x if x is None else x.detach() for name, x in named.items()} | changes


def zeros(*sizes, dtype=torch.float32, device="cpu"):
    return torch.zeros(sizes, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": None}, "q must be a torch.Tensor, got NoneType"),
        ({"k": 3}, "k must be a torch.Tensor, got int"),
        ({"v": "v"}, "v must be a torch.Tensor, got str"),
        ({"mask_bias": 1.0}, "mask_bias must be a torch.Tensor, got float"),
        ({"pair_bias": [1]}, "pair_bias must be a torch.Tensor, got list"),
        ({"q": zeros(3, 5, 4, 8)}, "q must have 5 axes [B, N, L, H, D], got shape [3, 5, 4, 8]"),
        ({"v": zeros(1, 2, 3, 7, 4, 8)}, "v must have 5 axes [B, N, L, H, D], got shape [1, 2, 3, 7, 4, 8]"),
        (
            {"q": zeros(2, 3, 5, 4, 8, dtype=torch.int64)},
            "q must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            {"k": zeros(2, 3, 7, 4, 8, dtype=torch.float16)},
            "k must have the dtype of q = torch.float32, got torch.float16",
        ),
        (
            {"v": zeros(2, 3, 7, 4, 8, dtype=torch.float64)},
            "v must have the dtype of q = torch.float32, got torch.float64",
        ),
        ({"k": zeros(2, 3, 7, 4, 8, device="meta")}, "k must be on the device of q = cpu, got meta"),
        ({"k": zeros(2, 3, 7, 2, 8)}, "k must be [B, N, Lk, H, D] = [2, 3, Lk, 4, 8], got [2, 3, 7, 2, 8]"),
        ({"k": zeros(2, 4, 7, 4, 8)}, "k must be [B, N, Lk, H, D] = [2, 3, Lk, 4, 8], got [2, 4, 7, 4, 8]"),
        ({"v": zeros(2, 3, 6, 4, 8)}, "v must have the shape of k = [2, 3, 7, 4, 8], got [2, 3, 6, 4, 8]"),
        (
            {"mask_bias": zeros(2, 3, 1, 1, 5)},
            "mask_bias must be [B, N, 1, 1, Lk] = [2, 3, 1, 1, 7], got [2, 3, 1, 1, 5]",
        ),
        ({"mask_bias": zeros(2, 3, 7)}, "mask_bias must be [B, N, 1, 1, Lk] = [2, 3, 1, 1, 7], got [2, 3, 7]"),
        (
            {"mask_bias": zeros(2, 3, 4, 1, 7)},
            "mask_bias must be [B, N, 1, 1, Lk] = [2, 3, 1, 1, 7], got [2, 3, 4, 1, 7]",
        ),
        (
            {"mask_bias": zeros(2, 3, 1, 1, 7, dtype=torch.bfloat16)},
            "mask_bias must be torch.float32 or torch.bool, got torch.bfloat16",
        ),
        ({"mask_bias": zeros(2, 3, 1, 1, 7, device="meta")}, "mask_bias must be on the device of q = cpu, got meta"),
        (
            {"pair_bias": zeros(2, 1, 4, 5, 5)},
            "pair_bias must be [B, 1, H, Lq, Lk] = [2, 1, 4, 5, 7], got [2, 1, 4, 5, 5]",
        ),
        (
            {"pair_bias": zeros(2, 2, 4, 5, 7)},
            "pair_bias must be [B, 1, H, Lq, Lk] = [2, 1, 4, 5, 7], got [2, 2, 4, 5, 7]",
        ),
        (
            {"pair_bias": zeros(2, 3, 4, 7, 5)},
            "pair_bias must be [B, N, H, Lq, Lk] = [2, 3, 4, 5, 7], got [2, 3, 4, 7, 5]",
        ),
        ({"pair_bias": zeros(4, 5, 7)}, "pair_bias must be [B, 1, H, Lq, Lk] = [2, 1, 4, 5, 7], got [4, 5, 7]"),
        ({"pair_bias": zeros(2, 1, 4, 5, 7, dtype=torch.bool)}, "pair_bias must be torch.float32, got torch.bool"),
        ({"pair_bias": zeros(2, 1, 4, 5, 7, device="meta")}, "pair_bias must be on the device of q = cpu, got meta"),
        ({"gate": 0.5}, "gate must be a torch.Tensor, got float"),
        ({"gate": zeros(2, 3, 5, 4, 1)}, "gate must have the shape of q = [2, 3, 5, 4, 8], got [2, 3, 5, 4, 1]"),
        ({"gate": zeros()}, "gate must have the shape of q = [2, 3, 5, 4, 8], got []"),
        (
            {"gate": zeros(2, 3, 5, 4, 8, dtype=torch.bfloat16)},
            "gate must have the dtype of q = torch.float32, got torch.bfloat16",
        ),
        ({"gate": zeros(2, 3, 5, 4, 8, device="meta")}, "gate must be on the device of q = cpu, got meta"),
        (
            {"gate": zeros(2, 3, 5, 8, 4).transpose(3, 4)},
            "gate must have stride 1 along its last axis, got strides [480, 160, 32, 1, 4]",
        ),
        (
            {"implementation": "cudnn"},
            "implementation must be None or one of sm90, sm80, tiled, reference, got 'cudnn'",
        ),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evoformer_attention(**arguments(**changes))


def test_a_16_bit_problem_takes_biases_of_its_dtype_and_fp32_only():
    inputs = make_inputs(SHAPE, torch.bfloat16)
    message = "pair_bias must be torch.bfloat16 or torch.float32, got torch.float16"
    with pytest.raises(ValueError, match=message):
        evoformer_attention(inputs.q, inputs.k, inputs.v, pair_bias=zeros(2, 1, 4, 5, 7, dtype=torch.float16))
    message = "mask_bias must be torch.bfloat16 or torch.float32 or torch.bool, got torch.float64"
    with pytest.raises(ValueError, match=message):
        evoformer_attention(inputs.q, inputs.k, inputs.v, mask_bias=zeros(2, 3, 1, 1, 7, dtype=torch.float64))


def test_heads_wider_than_128_are_not_implemented():
    x = zeros(1, 1, 2, 1, 129)
    with pytest.raises(NotImplementedError, match="the head dim of q must be at most 128, got 129"):
        evoformer_attention(x, x, x)


@pytest.mark.parametrize("name, reason", [("sm80", "cpu"), ("sm90", "cpu")])
def test_a_named_implementation_is_refused_with_the_reason(name, reason):
    with pytest.raises(NotImplementedError, match=f'implementation "{name}" cannot run this problem: .*{reason}'):
        evoformer_attention(**arguments(implementation=name))


def test_a_named_implementation_is_used(monkeypatch):
    used = []
    monkeypatch.setattr(
        _custom_op, "choose", lambda problem, name: used.append(name) or _dispatch.choose(problem, name)
    )
    for name in ("tiled", "reference", None):
        evoformer_attention(**arguments(implementation=name))
    assert used == ["tiled", "reference", None]


@pytest.mark.parametrize("direct", [True, False])
def test_forward_and_backward_choose_for_the_same_problem(monkeypatch, direct):
    """lse is read by nobody but the implementation that wrote it."""
    problems = []
    monkeypatch.setattr(
        _custom_op, "choose", lambda problem, name: problems.append(problem) or _dispatch.choose(problem, name)
    )
    monkeypatch.setattr(entry, "is_unobserved", lambda *tensors: direct)
    inputs = make_inputs(SHAPE, torch.bfloat16, pair="fp32")
    o = evoformer_attention(
        inputs.q, inputs.k, inputs.v, mask_bias=inputs.mask_bias, pair_bias=inputs.pair_bias, softmax_scale=0.25
    )
    torch.autograd.grad(o, list(inputs.differentiable().values()), inputs.do)
    sizes = (SHAPE.batch, SHAPE.rows, SHAPE.q_len, SHAPE.k_len, SHAPE.heads, SHAPE.head_dim)
    problem = _dispatch.Problem("cpu", None, torch.bfloat16, *sizes, torch.float32, SHAPE.batch, 0.25)
    assert problems == [problem, problem]


def test_the_automatic_choice_is_logged_once(caplog):
    _dispatch.forget_choices()
    with caplog.at_level(logging.INFO, logger="deepspeed_ds4sci"):
        for _ in range(3):
            evoformer_attention(**arguments())
    lines = [record.getMessage() for record in caplog.records if record.name == "deepspeed_ds4sci"]
    assert len(lines) == 1
    assert lines[0].startswith('evoformer_attention on cpu runs "tiled"; not sm90: ')


@pytest.mark.parametrize("gate", [None, "contiguous"])
@pytest.mark.parametrize("implementation", ["tiled", "reference"])
@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape("no-batch", 0, 3, 5, 7, 4, 8, ""),
        AttentionShape("no-rows", 2, 0, 5, 7, 4, 8, ""),
        AttentionShape("no-queries", 2, 3, 0, 7, 4, 8, ""),
        AttentionShape("no-keys", 2, 3, 5, 0, 4, 8, ""),
        AttentionShape("no-heads", 2, 3, 5, 7, 0, 8, ""),
        AttentionShape("no-width", 2, 3, 5, 7, 4, 0, ""),
    ],
    ids=str,
)
def test_empty_tensors_give_empty_results_and_zero_gradients(shape, implementation, gate):
    inputs = make_inputs(shape, gate=gate)
    results = run_op(inputs, implementation)
    assert results["o"].shape == inputs.q.shape
    for name, source in inputs.differentiable().items():
        assert results[f"d{name}"].shape == source.shape
    assert all(torch.count_nonzero(x) == 0 for x in results.tensors.values())


def test_the_default_scale_is_one_over_the_root_of_the_head_dim():
    given = arguments()
    assert torch.equal(evoformer_attention(**given), evoformer_attention(**given, softmax_scale=8**-0.5))
    assert not torch.equal(evoformer_attention(**given), evoformer_attention(**given, softmax_scale=1.0))


@pytest.mark.parametrize("implementation", ["tiled", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "ending_node", "strided_last"])
def test_the_output_is_contiguous(layout, implementation):
    inputs = make_inputs(SHAPE, layout=layout)
    assert all(x.is_contiguous() for x in run_op(inputs, implementation).tensors.values())


def test_inputs_are_left_as_they_were():
    inputs, untouched = (
        make_inputs(SHAPE, mask="minus_inf", pair="minus_inf", gate="contiguous"),
        make_inputs(SHAPE, mask="minus_inf", pair="minus_inf", gate="contiguous"),
    )
    run_op(inputs)
    for name, x in (inputs.named() | {"do": inputs.do}).items():
        assert torch.equal(x, getattr(untouched, name)), name


class TestExpandedPairBias:
    """OpenFold's chunking repeats the pair bias over the rows of a chunk with stride 0."""

    @pytest.mark.parametrize(
        "base, expanded",
        [
            ((2, 1, 4), (2, 3, 4)),
            ((1, 1, 4), (2, 1, 4)),
            ((2, 1, 1), (2, 1, 4)),
            ((1, 1, 1), (2, 3, 4)),
            ((2, 1, 4), (2, 1, 4)),
        ],
    )
    def test_it_reaches_the_op_without_its_copies(self, monkeypatch, base, expanded):
        seen = []
        monkeypatch.setattr(
            "deepspeed_ds4sci.ops.evoformer_attention.evoformer_attn",
            lambda q, k, v, mask, pair, *rest: seen.append(pair.shape) or q,
        )
        inputs = make_inputs(SHAPE)
        evoformer_attention(inputs.q, inputs.k, inputs.v, pair_bias=zeros(*base, 5, 7).expand(*expanded, 5, 7))
        assert seen == [(*base, 5, 7)]

    @pytest.mark.parametrize(
        "pair, sizes, axes",
        [("contiguous", (2, 3, 4), (1,)), ("shared_samples", (2, 1, 4), (0,)), ("one_head", (2, 3, 4), (1, 2))],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_expanded_tensor_gets_the_total_gradient(self, dtype, pair, sizes, axes):
        expected = run_op(make_inputs(SHAPE, dtype, pair=pair))
        inputs = make_inputs(SHAPE, dtype, pair=pair)
        expanded = inputs.pair_bias.expand(*sizes, -1, -1)
        o = evoformer_attention(inputs.q, inputs.k, inputs.v, mask_bias=inputs.mask_bias, pair_bias=expanded)
        of_expanded, of_base = torch.autograd.grad(o, (expanded, inputs.pair_bias), inputs.do)
        assert torch.equal(o, expected["o"])
        assert repeated_axes(of_expanded) == axes
        torch.testing.assert_close(of_base, expected["dpair_bias"])

    def test_second_derivatives(self):
        shape = AttentionShape("tiny", 1, 2, 2, 2, 1, 2, "numerical derivatives")
        inputs = make_inputs(shape, torch.float64)

        def attend(q, pair_bias):
            return evoformer_attention(q, inputs.k, inputs.v, pair_bias=pair_bias.expand(-1, 2, -1, -1, -1))

        assert torch.autograd.gradgradcheck(attend, (inputs.q, inputs.pair_bias))

    def test_nothing_changes_for_a_tensor_without_repeats(self):
        x = torch.randn(2, 3, 1)
        assert without_repeats(x, (0, 1, 2)) is x
        assert without_repeats(x.expand(2, 3, 4), (0, 1)).shape == (2, 3, 4)
        assert without_repeats(x.expand(2, 3, 4), (0, 2)).shape == (2, 3, 1)


@pytest.mark.parametrize("implementation", ["tiled", "reference"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mask", ["additive", "shared", "bool"])
def test_a_pair_bias_of_each_row(batch, mask, implementation):
    """As if every row were a problem of its own."""
    shape = AttentionShape("per-row", batch, 3, 5, 7, 2, 4, "rows with their own pair bias")
    inputs = make_inputs(shape, torch.float64, mask=mask, pair="per_row", gate="contiguous")
    results = run_op(inputs, implementation)
    for row in range(shape.rows):
        part = slice(row, row + 1)
        mask_bias = inputs.mask_bias if inputs.mask_bias.shape[1] == 1 else inputs.mask_bias[:, part]
        o = evoformer_attention(
            inputs.q[:, part],
            inputs.k[:, part],
            inputs.v[:, part],
            mask_bias=mask_bias,
            pair_bias=inputs.pair_bias[:, part],
            gate=inputs.gate[:, part],
        )
        torch.testing.assert_close(results["o"][:, part], o.detach())
        for name in ("q", "k", "v", "pair_bias", "gate"):
            tensor = getattr(inputs, name)
            expected = torch.autograd.grad(o, tensor, inputs.do[:, part], retain_graph=True)[0][:, part]
            torch.testing.assert_close(results[f"d{name}"][:, part], expected)


def test_a_pair_bias_of_each_row_shared_by_samples():
    shape = AttentionShape("rows-shared", 2, 3, 5, 7, 2, 4, "rows with their own pair bias, the same in all samples")
    inputs = make_inputs(shape, torch.float64, pair="per_row", gate="contiguous")
    shared = inputs.pair_bias[:1].detach().requires_grad_()
    whole = shared.expand(2, -1, -1, -1, -1).clone()
    results = []
    for pair_bias in (shared, whole):
        o = evoformer_attention(**(inputs.named() | {"pair_bias": pair_bias}))
        sources = (inputs.q, inputs.k, inputs.mask_bias, inputs.gate, shared)
        results.append((o, *torch.autograd.grad(o, sources, inputs.do)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert results[0][0].is_contiguous()


class TestArgumentsLikeThoseOfAnEarlierCall:
    """Checks are left out for them alone."""

    @pytest.fixture(autouse=True)
    def nothing_known(self, monkeypatch):
        monkeypatch.setattr(entry, "_canonical", set())

    def make(self, **changes):
        given = {"mask_bias": zeros(2, 3, 1, 1, 7), "pair_bias": zeros(2, 1, 4, 5, 7), "gate": zeros(2, 3, 5, 4, 8)}
        return arguments(**(given | changes))

    def test_are_not_checked_again(self, monkeypatch):
        expected = evoformer_attention(**self.make())
        monkeypatch.setattr(entry, "_check", None)
        assert torch.equal(evoformer_attention(**self.make()), expected)

    @pytest.mark.parametrize(
        "change",
        [
            {"k": zeros(2, 3, 7, 4, 16)},
            {"k": zeros(2, 3, 7, 4, 8, dtype=torch.bfloat16)},
            {"k": zeros(2, 3, 7, 4, 8, device="meta")},
            {"v": zeros(2, 3, 8, 4, 8)},
            {"v": zeros(2, 3, 7, 4, 8, dtype=torch.float64)},
            {"v": zeros(2, 3, 7, 4, 8, device="meta")},
            {"v": None},
            {"mask_bias": zeros(2, 3, 1, 1, 8)},
            {"mask_bias": zeros(2, 3, 1, 1, 7, dtype=torch.float64)},
            {"mask_bias": zeros(2, 3, 1, 1, 7, device="meta")},
            {"pair_bias": zeros(2, 1, 3, 5, 7)},
            {"pair_bias": zeros(2, 1, 4, 5, 7, dtype=torch.bool)},
            {"pair_bias": zeros(2, 1, 4, 5, 7, device="meta")},
            {"gate": zeros(2, 3, 5, 4, 9)},
            {"gate": zeros(2, 3, 5, 4, 8, dtype=torch.bfloat16)},
            {"gate": zeros(2, 3, 5, 4, 8, device="meta")},
            {"gate": zeros(2, 3, 5, 8, 4).transpose(3, 4)},
            {"q": zeros(2, 3, 5, 4, 9)},
        ],
        ids=lambda change: "-".join((*change, *(str(getattr(x, "shape", x)) for x in change.values()))),
    )
    def test_any_difference_is_checked(self, change):
        evoformer_attention(**self.make())
        with pytest.raises(ValueError, match="must"):
            evoformer_attention(**self.make(**change))

    def test_a_bias_of_the_same_shape_that_repeats_itself_is_another(self, monkeypatch):
        evoformer_attention(**self.make())
        seen = []
        monkeypatch.setattr(entry, "evoformer_attn", lambda q, k, v, mask, pair, *rest: seen.append(pair.shape) or q)
        evoformer_attention(**self.make(pair_bias=zeros(1, 1, 4, 5, 7).expand(2, 1, 4, 5, 7)))
        assert seen == [(1, 1, 4, 5, 7)]

    def test_only_so_many_are_remembered(self, monkeypatch):
        monkeypatch.setattr(entry, "_MAX_FORMS", 3)
        for length in range(1, 9):
            evoformer_attention(*(zeros(1, 1, length, 1, 8) for _ in "qkv"))
            assert 1 <= len(entry._canonical) <= 3

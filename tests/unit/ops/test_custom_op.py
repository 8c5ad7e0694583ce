# SPDX-License-Identifier: Apache-2.0
"""The op as PyTorch sees it: opcheck, compile, checkpointing, autocast, odd gradients, second derivatives."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deepspeed_ds4sci.ops._precision import own_precision
from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention
from deepspeed_ds4sci.ops.reference import REFERENCE
from deepspeed_ds4sci.ops.tiled import TILED
from tests.helpers.inputs import make_inputs
from tests.helpers.numerics import run, run_op
from tests.helpers.processes import run_python
from tests.helpers.shapes import AttentionShape

SHAPE = AttentionShape("op", 2, 3, 5, 7, 2, 4, "small and odd")
OPTIONS = [  # mask, pair, gate
    ("none", "none", None),
    ("none", "none", "contiguous"),
    ("additive", "none", None),
    ("bool", "none", None),
    ("none", "contiguous", None),
    ("additive", "contiguous", None),
    ("additive", "contiguous", "unaligned"),
    ("bool", "one_head", "contiguous"),
    ("shared", "shared_samples", None),
    ("expanded", "transposed", None),
]
FORWARD = torch.ops.deepspeed_ds4sci.evoformer_attn_fwd.default
BACKWARD = torch.ops.deepspeed_ds4sci.evoformer_attn_bwd.default


def attend(inputs, **options):
    return evoformer_attention(**inputs.named(), **options)


def all_gradients(o, inputs):
    return torch.autograd.grad(o, list(inputs.differentiable().values()), inputs.do.to(o.dtype))


@pytest.mark.parametrize("implementation", ["", "reference"])
@pytest.mark.parametrize("mask, pair, gate", OPTIONS)
def test_opcheck(mask, pair, gate, implementation):
    inputs = make_inputs(SHAPE, mask=mask, pair=pair, gate=gate)
    opcheck(FORWARD, (*inputs.tensors(), 0.5, implementation))
    detached = tuple(None if x is None else x.detach() for x in inputs.tensors())
    o, lse = FORWARD(*detached, 0.5, implementation)
    wanted = [x is not None and x.requires_grad for x in inputs.tensors()]
    opcheck(BACKWARD, (inputs.do, *detached, o, lse, 0.5, implementation, wanted))


@pytest.mark.parametrize("mask, pair", [("fp32", "fp32"), ("fp32", "none"), ("none", "fp32"), ("bool", "contiguous")])
def test_opcheck_in_bf16_with_fp32_biases(mask, pair):
    inputs = make_inputs(SHAPE, torch.bfloat16, mask=mask, pair=pair)
    opcheck(FORWARD, (*inputs.tensors(), 0.5, ""))
    assert {name: x.dtype for name, x in run_op(inputs).tensors.items()} == {
        "o": torch.bfloat16,
        **{f"d{name}": x.dtype for name, x in inputs.differentiable().items()},
    }


@pytest.mark.parametrize("layout", ["ending_node", "packed_qkv", "strided_last"])
def test_opcheck_of_views(layout):
    inputs = make_inputs(SHAPE, layout=layout)
    opcheck(FORWARD, (*inputs.tensors(), 0.5, ""))


@pytest.mark.parametrize(
    "mask, pair, gate",
    [("additive", "contiguous", "contiguous"), ("bool", "none", None), ("none", "shared_samples", None)],
)
def test_first_and_second_derivatives_of_the_tiled_path(mask, pair, gate):
    shape = AttentionShape("tiny", 2, 1, 2, 3, 1, 2, "numerical derivatives")
    inputs = make_inputs(shape, torch.float64, mask=mask, pair=pair, gate=gate)
    tensors = inputs.differentiable()

    def function(*values):
        given = inputs.named() | dict(zip(tensors, values, strict=True))
        return evoformer_attention(**given, implementation="tiled")

    assert gradcheck(function, tuple(tensors.values()))
    assert gradgradcheck(function, tuple(tensors.values()))


def test_a_gradient_penalty_reaches_the_inputs():
    inputs = make_inputs(SHAPE, torch.float64, gate="contiguous")
    penalties = []
    for implementation in ("tiled", "reference"):
        o = attend(inputs, implementation=implementation)
        dq, dgate = torch.autograd.grad(o.sum(), (inputs.q, inputs.gate), create_graph=True)
        penalties.append(torch.autograd.grad(dq.square().sum() + dgate.square().sum(), inputs.tensors()))
    for tiled, reference in zip(*penalties, strict=True):
        torch.testing.assert_close(tiled, reference)


def test_third_derivatives():
    x = torch.randn(1, 1, 2, 1, 2, dtype=torch.float64, requires_grad=True)

    def slope(x):
        return torch.autograd.grad(evoformer_attention(x, x, x).sin().sum(), x, create_graph=True)[0]

    assert gradgradcheck(slope, (x,))


@pytest.mark.parametrize(
    "mask, pair, gate",
    [("additive", "contiguous", "unaligned"), ("bool", "none", None), ("none", "expanded", "contiguous")],
)
def test_compile_without_graph_breaks(mask, pair, gate):
    inputs = make_inputs(SHAPE, mask=mask, pair=pair, gate=gate)

    def model(q, k, v, mask_bias, pair_bias, gate):
        return evoformer_attention(q * 2, k, v, mask_bias=mask_bias, pair_bias=pair_bias, gate=gate).sin()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, actual = model(*inputs.tensors()), compiled(*inputs.tensors())
    assert torch.equal(actual, expected)
    for got, want in zip(all_gradients(actual, inputs), all_gradients(expected, inputs), strict=True):
        assert torch.equal(got, want)


def test_compile_with_inductor_and_changing_sizes():
    def model(q, k, v, pair_bias, gate):
        return evoformer_attention(q, k, v, pair_bias=pair_bias, gate=gate) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (5, 9, 12):
        shape = AttentionShape("dynamic", 1, 3, length, length, 2, 4, "sizes change")
        inputs = make_inputs(shape, mask="none", gate="contiguous")
        actual = compiled(inputs.q, inputs.k, inputs.v, inputs.pair_bias, inputs.gate)
        assert torch.equal(actual, attend(inputs) + 1)
        for got, want in zip(all_gradients(actual, inputs), all_gradients(attend(inputs), inputs), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    inputs = make_inputs(SHAPE, gate="contiguous")
    names = ("q", "k", "v", "gate")

    def block(q, k, v, mask_bias, pair_bias, gate):
        return evoformer_attention(q, k, v, mask_bias=mask_bias, pair_bias=pair_bias, gate=gate)

    o = checkpoint(block, *inputs.tensors(), use_reentrant=use_reentrant)
    expected = run_op(inputs)
    grads = dict(zip(inputs.differentiable(), all_gradients_of(o, inputs, use_reentrant), strict=True))
    for name in names:
        assert torch.equal(grads[name], expected[f"d{name}"])


def all_gradients_of(o, inputs, use_reentrant):
    """Reentrant checkpointing supports .backward() only."""
    if not use_reentrant:
        return all_gradients(o, inputs)
    o.backward(inputs.do)
    return tuple(x.grad for x in inputs.differentiable().values())


@pytest.mark.parametrize("gate", [None, "contiguous"])
def test_the_gradient_of_a_sum_has_zero_strides(gate):
    inputs = make_inputs(SHAPE, gate=gate)
    inputs.do = torch.ones(()).expand(inputs.q.shape)
    expected = run(evoformer_attention, inputs)
    actual = torch.autograd.grad(attend(inputs).sum(), list(inputs.differentiable().values()))
    for (name, want), got in zip(list(expected.tensors.items())[1:], actual, strict=True):
        assert torch.equal(got, want), name


@pytest.mark.parametrize("layout", ["ending_node", "unaligned", "strided_last"])
def test_a_gradient_in_any_layout(layout):
    inputs, other = make_inputs(SHAPE, gate="contiguous"), make_inputs(SHAPE, layout=layout)
    expected = run_op(inputs)
    inputs.do = other.do
    for name, tensor in run_op(inputs).tensors.items():
        assert torch.equal(tensor, expected[name]), name


def test_no_gradient_is_kept_where_none_is_asked_for():
    inputs = make_inputs(SHAPE)
    with torch.no_grad():
        assert not attend(inputs).requires_grad
    for x in inputs.differentiable().values():
        x.requires_grad_(False)
    assert not attend(inputs).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(attend(inputs), attend(inputs, implementation="reference"))


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_op_and_get_the_same_results():
    inputs = make_inputs(SHAPE)
    expected = run_op(inputs)
    with _Recorder() as recorder:
        actual = run_op(inputs)
    ours = [name for name in recorder.names if name.startswith("deepspeed_ds4sci")]
    assert ours == ["deepspeed_ds4sci::evoformer_attn_fwd", "deepspeed_ds4sci::evoformer_attn_bwd"]
    for name, tensor in expected.tensors.items():
        assert torch.equal(actual[name], tensor), name


def test_fake_tensors_get_shapes_without_any_computation():
    with FakeTensorMode():
        x = torch.empty(1, 4096, 4096, 8, 32, dtype=torch.bfloat16, requires_grad=True)
        o = evoformer_attention(x, x, x)
        (dx,) = torch.autograd.grad(o.sum(), x)
    assert (o.shape, dx.shape, dx.dtype) == (x.shape, x.shape, torch.bfloat16)


def test_parameters_are_plain_tensors_to_the_op():
    inputs = make_inputs(SHAPE)
    expected = run_op(inputs)
    inputs.pair_bias = torch.nn.Parameter(inputs.pair_bias.detach())
    assert torch.equal(run_op(inputs)["dpair_bias"], expected["dpair_bias"])


def test_lse_cannot_be_differentiated():
    assert [x.requires_grad for x in FORWARD(*make_inputs(SHAPE).tensors(), 0.5, "")] == [True, False]


def test_a_boolean_mask_has_no_gradient():
    inputs = make_inputs(SHAPE, mask="bool")
    tensors = tuple(None if x is None else x.detach() for x in inputs.tensors())
    o, lse = FORWARD(*tensors, 0.5, "")
    with pytest.raises(ValueError, match="mask_bias must be a float tensor to have a gradient, got torch.bool"):
        BACKWARD(inputs.do, *tensors, o, lse, 0.5, "", [False, False, False, True, False, False])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
class TestAutocast:
    def test_products_run_in_the_autocast_dtype(self, dtype):
        inputs = make_inputs(SHAPE, gate="contiguous")
        with torch.autocast("cpu", dtype=dtype):
            o = attend(inputs)
        rounded = evoformer_attention(
            inputs.q.to(dtype),
            inputs.k.to(dtype),
            inputs.v.to(dtype),
            mask_bias=inputs.mask_bias,
            pair_bias=inputs.pair_bias,
            gate=inputs.gate.to(dtype),
        )
        assert o.dtype == dtype
        assert torch.equal(o, rounded)

    def test_gradients_have_the_dtypes_of_the_inputs(self, dtype):
        inputs = make_inputs(SHAPE, gate="contiguous")
        with torch.autocast("cpu", dtype=dtype):
            grads = all_gradients(attend(inputs), inputs)  # backward inside the region too
        assert {grad.dtype for grad in grads} == {torch.float32}

    @pytest.mark.parametrize("implementation", ["tiled", "reference"])
    def test_sums_inside_stay_fp32(self, dtype, implementation):
        inputs = make_inputs(SHAPE, dtype, gate="contiguous")
        expected = run_op(inputs, implementation)
        with torch.autocast("cpu", dtype=dtype):
            actual = run_op(inputs, implementation)
        for name, tensor in expected.tensors.items():
            assert torch.equal(actual[name], tensor), name

    def test_a_bias_of_a_third_dtype_follows(self, dtype):
        inputs = make_inputs(SHAPE)
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        inputs.pair_bias = inputs.pair_bias.detach().to(other).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            o = attend(inputs)
        expected = evoformer_attention(
            inputs.q.to(dtype),
            inputs.k.to(dtype),
            inputs.v.to(dtype),
            mask_bias=inputs.mask_bias,
            pair_bias=inputs.pair_bias.to(dtype),
        )
        assert torch.equal(o, expected)
        assert all_gradients(o, inputs)[-1].dtype == other

    def test_arguments_are_still_checked(self, dtype):
        inputs = make_inputs(SHAPE)
        with torch.autocast("cpu", dtype=dtype):
            with pytest.raises(ValueError, match="k must be a torch.Tensor, got NoneType"):
                evoformer_attention(inputs.q, None, inputs.v)
            with pytest.raises(ValueError, match="pair_bias must be a torch.Tensor, got float"):
                evoformer_attention(inputs.q, inputs.k, inputs.v, pair_bias=1.0)
            with pytest.raises(ValueError, match="v must be float16, bfloat16, float32 or float64, got torch.int64"):
                evoformer_attention(inputs.q, inputs.k, inputs.v.long())

    def test_fp64_is_left_alone(self, dtype):
        inputs = make_inputs(SHAPE, torch.float64)
        with torch.autocast("cpu", dtype=dtype):
            assert attend(inputs).dtype == torch.float64


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_reduced_precision_of_fp32_products_is_off_inside_and_restored(device_type):
    matmul = torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(KeyError), own_precision(device_type):
            assert matmul.fp32_precision == "ieee"
            raise KeyError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("inherited", [True, False])
def test_an_inherited_precision_stays_inherited(device_type, inherited):
    """A process of its own: torch checks these settings against each other."""
    run_python(f"""
        import torch
        from deepspeed_ds4sci.ops._precision import own_precision
        matmul = torch.backends.{"cuda" if device_type == "cuda" else "mkldnn"}.matmul
        if {inherited}:
            matmul.fp32_precision = "none"
            torch.backends.fp32_precision = "tf32"
        else:
            matmul.fp32_precision = "tf32"
        with own_precision("{device_type}"):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == ("ieee" if {inherited} else "tf32")
    """)


class Settings(TorchDispatchMode):
    """Notes under which settings operations run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add((torch.is_autocast_enabled("cpu"), torch.backends.mkldnn.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("entry", [TILED, REFERENCE], ids=lambda entry: entry.name)
def test_implementations_of_torch_products_set_it(entry):
    inputs = make_inputs(SHAPE, torch.float32, gate="contiguous")
    tensors = tuple(x.detach() for x in inputs.tensors())
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        with torch.autocast("cpu"):
            with Settings() as forward:
                o, lse = entry.forward(*tensors, 0.5)
            with Settings() as backward:
                entry.backward(inputs.do, *tensors, o, lse, 0.5, (True,) * 6)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert forward.seen == backward.seen == {(False, "ieee")}

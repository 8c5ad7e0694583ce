# SPDX-License-Identifier: Apache-2.0
"""What surrounds the CUDA kernels: determinism, copies, streams, graphs, compile, autocast, DeepSpeed's calls."""

import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deepspeed_ds4sci import evoformer_attention
from deepspeed_ds4sci.ops import sm90
from deepspeed_ds4sci.ops._dispatch import explain, problem_of
from deepspeed_ds4sci.ops._extension import extension
from tests.helpers import shapes
from tests.helpers.inputs import make_inputs
from tests.helpers.numerics import check_against_eager, run_op

from .runs import IMPLEMENTATIONS, ON_HOPPER, RUNS, RUNS_16_BIT

pytestmark = pytest.mark.gpu

SHAPE = shapes.AttentionShape("medium", 1, 33, 130, 130, 4, 32, "tails and several tiles")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def attend(inputs, implementation):
    return evoformer_attention(**inputs.named(), implementation=implementation)


def test_every_compiled_implementation_for_this_gpu_can_run():
    """A library without the Hopper kernels, or one that does not compile, must not pass as a skipped test."""
    inputs = make_inputs(SHAPE, torch.bfloat16, "cuda")
    reasons = dict(explain(problem_of(inputs.q, inputs.k, inputs.pair_bias, SHAPE.head_dim**-0.5)))
    assert reasons["sm80"] is None
    assert torch.cuda.get_device_capability() != sm90.CAPABILITY or reasons["sm90"] is None


@pytest.mark.parametrize(
    "mask, pair, gate",
    (
        ("additive", "contiguous", None),
        ("additive", "contiguous", "contiguous"),
        ("bool", "none", None),
        ("minus_inf", "shared_samples", None),
    ),
)
@pytest.mark.parametrize("implementation, dtype", RUNS)
def test_twenty_runs_give_the_same_bits(implementation, dtype, mask, pair, gate):
    inputs = make_inputs(SHAPE, dtype, "cuda", mask=mask, pair=pair, gate=gate)
    first = run_op(inputs, implementation)
    for _ in range(19):
        again = run_op(inputs, implementation)
        for name, tensor in first.tensors.items():
            assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("implementation, dtype", RUNS)
def test_an_open_gate_changes_the_order_of_delta_alone(implementation, dtype):
    """sigmoid(100) is 1. What delta enters may differ by the rounding of its sum, which other lanes add up."""
    plain, gated = (make_inputs(SHAPE, dtype, "cuda") for _ in range(2))
    gated.gate = torch.full_like(gated.q, 100.0)
    expected = run_op(plain, implementation)
    for name, tensor in run_op(gated, implementation).tensors.items():
        if name in ("o", "dv"):
            assert torch.equal(tensor, expected[name]), name
        else:
            error = (tensor.double() - expected[name].double()).norm() / expected[name].double().norm()
            assert error.item() <= max(torch.finfo(dtype).eps / 2, 1e-6), name


@pytest.mark.parametrize("dtype", sm90.DTYPES, ids=str)
@ON_HOPPER
def test_the_gated_gradients_of_both_paths_agree(dtype):
    inputs = make_inputs(SHAPE, dtype, "cuda", gate="contiguous")
    portable, hopper = (run_op(inputs, name) for name in ("sm80", "sm90"))
    for name, expected in portable.tensors.items():
        difference = (hopper[name].double() - expected.double()).norm() / expected.double().norm()
        assert difference.item() <= 8 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("implementation, dtype", RUNS_16_BIT)
def test_a_gate_is_applied_once_where_the_online_softmax_runs_again(implementation, dtype):
    """Rows whose largest pair bias is dropped are computed again by another kernel, gate included."""
    inputs = make_inputs(SHAPE, dtype, "cuda", gate="contiguous")
    with torch.no_grad():
        inputs.pair_bias[..., 5, 77] = 300.0
        inputs.mask_bias[..., 77] = float("-inf")
    check_against_eager(inputs, implementation)


def test_same_bits_beside_other_work(implementation):
    inputs = make_inputs(SHAPE, torch.bfloat16, "cuda")
    first = run_op(inputs, implementation)
    side, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    with torch.cuda.stream(side):
        for _ in range(20):
            noise = noise @ noise
    again = run_op(inputs, implementation)
    for name, tensor in first.tensors.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("gate", (None, "transposed"))
@pytest.mark.parametrize("layout", ("ending_node", "packed_qkv", "heads_first"))
def test_aligned_views_are_not_copied(implementation, layout, gate):
    """Peak memory of a view equals that of contiguous tensors: no hidden copies, forward and backward."""
    shape = shapes.AttentionShape("square", 1, 256, 256, 256, 4, 32, "triangle")

    def peak(layout, gate):
        inputs = make_inputs(shape, torch.bfloat16, "cuda", layout=layout, gate=gate)
        gc.collect()  # what earlier tests left must not be freed in between
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        # What was asked for: blocks may be larger, by what earlier tests left in the allocator.
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        run_op(inputs, implementation)
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before

    assert peak(layout, gate) == peak("contiguous", gate and "contiguous")


def test_a_gate_in_the_op_takes_less_memory_than_one_apart(implementation):
    """Beside the gated output there is never an ungated one."""
    shape = shapes.AttentionShape("square", 1, 256, 256, 256, 4, 32, "triangle")
    inputs = make_inputs(shape, torch.bfloat16, "cuda", gate="contiguous")
    gate, sources = inputs.gate, list(inputs.differentiable().values())

    def peak(step):
        step()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    def fused():
        torch.autograd.grad(attend(inputs, implementation), sources, inputs.do)

    def apart():
        o = evoformer_attention(**(inputs.named() | {"gate": None}), implementation=implementation)
        torch.autograd.grad(torch.sigmoid(gate) * o, sources, inputs.do)

    assert peak(fused) <= peak(apart) - inputs.q.numel() * 2


def test_extra_memory_grows_with_length_not_its_square(implementation):
    shape = shapes.BY_NAME["triangle-1024"]
    inputs = make_inputs(shape, torch.bfloat16, "cuda", mask="additive")
    inputs.mask_bias = inputs.mask_bias.detach()  # a gradient that nobody asks for here would be computed all the same
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = attend(inputs, implementation)
    torch.autograd.grad(o, (inputs.q, inputs.k, inputs.v, inputs.pair_bias), inputs.do)
    assert (torch.cuda.max_memory_allocated() - before) / 2**20 <= 1150


def test_gradient_of_a_sum_has_zero_strides(implementation):
    inputs = make_inputs(SHAPE, torch.bfloat16, "cuda")
    expected = torch.autograd.grad(attend(inputs, implementation), inputs.q, torch.ones_like(inputs.do))[0]
    actual = torch.autograd.grad(attend(inputs, implementation).sum(), inputs.q)[0]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", (SHAPE, shapes.MANY_ITEMS[0]), ids=lambda shape: shape.name)
def test_unwanted_gradients_change_nothing(shape, implementation):
    inputs = make_inputs(shape, torch.bfloat16, "cuda", gate="contiguous")
    every = run_op(inputs, implementation)
    for name, tensor in inputs.differentiable().items():
        alone = torch.autograd.grad(attend(inputs, implementation), tensor, inputs.do)[0]
        assert torch.equal(alone, every[f"d{name}"]), name


def test_side_stream(implementation):
    inputs = make_inputs(SHAPE, torch.bfloat16, "cuda")
    expected = run_op(inputs, implementation)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The inputs' last value arrives late on this stream: a launch elsewhere would read the zeros.
        late = inputs.q.detach().clone()
        inputs.q.data.zero_()
        torch.cuda._sleep(50_000_000)
        inputs.q.data.copy_(late)
        actual = run_op(inputs, implementation)
    stream.synchronize()
    for name, tensor in expected.tensors.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_second_device(implementation):
    assert torch.cuda.current_device() == 0
    check_against_eager(make_inputs(SHAPE, torch.bfloat16, "cuda:1"), implementation)
    assert torch.cuda.current_device() == 0


def test_cuda_graph_replays_forward_and_backward(implementation):
    inputs = make_inputs(SHAPE, torch.bfloat16, "cuda", gate="contiguous")
    sources = list(inputs.differentiable().values())

    def step():
        o = attend(inputs, implementation)
        return (o, *torch.autograd.grad(o, sources, inputs.do))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = make_inputs(SHAPE, torch.bfloat16, "cuda", gate="contiguous", seed=1)
    for old, new in zip((*sources, inputs.do), (*fresh.differentiable().values(), fresh.do), strict=True):
        old.data.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for name, actual in zip(run_op(fresh, implementation).tensors.items(), captured, strict=True):
        assert torch.equal(actual, name[1]), name[0]


def test_compile_fullgraph(implementation):
    inputs = make_inputs(SHAPE, torch.bfloat16, "cuda", gate="contiguous")
    compiled = torch.compile(attend, fullgraph=True)
    sources = list(inputs.differentiable().values())
    actual = torch.autograd.grad(compiled(inputs, implementation), sources, inputs.do)
    expected = torch.autograd.grad(attend(inputs, implementation), sources, inputs.do)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing(implementation):
    inputs = make_inputs(SHAPE, torch.bfloat16, "cuda", gate="contiguous")
    sources = list(inputs.differentiable().values())
    actual = torch.autograd.grad(checkpoint(attend, inputs, implementation, use_reentrant=False), sources, inputs.do)
    expected = torch.autograd.grad(attend(inputs, implementation), sources, inputs.do)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_computes_in_16_bits():
    inputs = make_inputs(SHAPE, torch.float32, "cuda", mask="fp32", pair="fp32", gate="contiguous")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        o = attend(inputs, None)
    assert o.dtype == torch.bfloat16
    grads = torch.autograd.grad(o, (inputs.q, inputs.pair_bias, inputs.gate), inputs.do.bfloat16())
    assert {grad.dtype for grad in grads} == {torch.float32}


@pytest.mark.parametrize(
    "mask, pair, gate",
    (
        ("none", "none", "contiguous"),
        ("additive", "none", None),
        ("bool", "contiguous", None),
        ("additive", "contiguous", "contiguous"),
    ),
)
def test_opcheck(implementation, mask, pair, gate):
    shape = shapes.AttentionShape("tiny", 1, 2, 17, 19, 2, 16, "opcheck")
    inputs = make_inputs(shape, torch.bfloat16, "cuda", mask=mask, pair=pair, gate=gate)
    torch.library.opcheck(
        torch.ops.deepspeed_ds4sci.evoformer_attn_fwd.default,
        (*inputs.tensors(), shape.head_dim**-0.5, implementation),
    )


def test_deepspeed_entry_points():
    """DeepSpeed's own Python wrapper can run on our library: same call, same buffers."""
    inputs = make_inputs(SHAPE, torch.bfloat16, "cuda")
    expected = run_op(inputs, "sm80")
    q, k, v, mask, pair = (x.detach() for x in inputs.tensors()[:5])
    o = torch.empty_like(q)
    lse = torch.empty((33, 4, 160), dtype=torch.float32, device="cuda")  # DeepSpeed rounds the length up to 32
    extension().attention(q, k, v, mask, pair, o, lse)
    assert torch.equal(o, expected["o"])
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    db1, db2 = (torch.zeros_like(x, dtype=torch.float32) for x in (mask, pair))
    extension().attention_bwd(inputs.do, q, k, v, o, lse, torch.empty_like(lse), mask, pair, dq, dk, dv, db1, db2)
    for name, actual in (("dq", dq), ("dk", dk), ("dv", dv)):
        assert torch.equal(actual, expected[name]), name
    assert torch.equal(db1.bfloat16(), expected["dmask_bias"])
    assert torch.equal(db2.bfloat16(), expected["dpair_bias"])

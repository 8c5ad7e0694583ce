# SPDX-License-Identifier: Apache-2.0
"""The Python face of the compiled library, on one without kernels: which functions run, and what they are told."""

import itertools
import shutil
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from deepspeed_ds4sci.ops import _extension, _layout, sm90
from deepspeed_ds4sci.ops._extension import Extension
from deepspeed_ds4sci.ops._params import layout_of, with_addresses
from tests.helpers.inputs import make_inputs
from tests.helpers.shapes import AttentionShape
from tests.helpers.stub_library import Record, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the stub with")


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    return Extension(build(tmp_path_factory.mktemp("stub")))


def make_tensors(heads=2, q_len=16, k_len=24, head_dim=8):
    q, k, v = (torch.randn(1, 3, n, heads, head_dim, dtype=torch.bfloat16) for n in (q_len, k_len, k_len))
    pair = torch.randn(1, 1, heads, q_len, k_len, dtype=torch.bfloat16)
    return q, k, v, torch.randn(1, 3, 1, 1, k_len), pair, torch.randn_like(q)


@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_each_path_runs_its_own_kernels(stub, path):
    mine, other = Record(stub, path), Record(stub, "sm90" if path == "sm80" else "sm80")
    (forwards, backwards), before = mine.calls, other.calls
    inputs = make_tensors()
    o, lse = stub.forward(*inputs, 0.5, path=path)
    assert mine.calls == (forwards + 1, backwards)
    assert mine.params.o == o.data_ptr()
    stub.backward(o, *inputs, o, lse, 0.5, (False, False, False, False, True, False), path=path)
    assert mine.calls == (forwards + 1, backwards + 1)
    assert mine.params.dpair_splits == {"sm80": 1, "sm90": 2}[path]
    assert other.calls == before


def test_a_path_that_was_not_compiled_is_refused(tmp_path, monkeypatch):
    portable = Extension(build(tmp_path, with_sm90=False))
    monkeypatch.setattr(_extension, "extension", lambda: portable)
    _extension.missing_reason.cache_clear()
    assert _extension.missing_reason("sm80") is None
    assert "was compiled without the sm90 kernels" in _extension.missing_reason("sm90")
    _extension.missing_reason.cache_clear()
    portable.forward(*make_tensors(), 0.5)
    with pytest.raises(RuntimeError, match=r"stub.so was compiled without the sm90 kernels: .*sm90_fwd"):
        portable.forward(*make_tensors(), 0.5, path="sm90")


SHAPE = AttentionShape("small", 2, 3, 16, 24, 2, 8, "keys and head dim of whole 16 bytes")
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.bool: 3}
EVERY = (True, True, True, True, True, True)
# Several times in another order: what is kept of one call must not reach another.
VARIANTS = list(
    itertools.product(
        ("contiguous", "packed_qkv", "heads_first"),
        ("none", "additive", "fp32", "bool", "shared", "expanded"),
        ("none", "contiguous", "fp32", "shared_samples", "one_head"),
        (None, "contiguous"),
    )
)


def make(layout, mask, pair, gate=None, dtype=torch.bfloat16):
    inputs = make_inputs(SHAPE, dtype, layout=layout, mask=mask, pair=pair, gate=gate)
    return (*(None if x is None else x.detach() for x in inputs.tensors()), inputs.do)


def address(x):
    return None if x is None else x.data_ptr()


def check_told(told, q, k, v, mask, pair, gate, softmax_scale):
    """The parameters are those of these very tensors."""
    addresses = [told.q, told.k, told.v, told.mask_bias, told.pair_bias, told.gate]
    assert addresses == [address(x) for x in (q, k, v, mask, pair, gate)]
    for strides, x in ((told.q_stride, q), (told.k_stride, k), (told.v_stride, v)):
        assert (strides.b, strides.n, strides.l, strides.h) == x.stride()[:4]
    assert (told.batch, told.rows, told.q_len, told.heads, told.head_dim) == q.shape
    assert (told.k_len, told.dtype) == (k.shape[2], CODES[q.dtype])
    assert told.softmax_scale == softmax_scale
    if mask is not None:
        assert (told.mask_batch, told.mask_rows, told.mask_dtype) == (*mask.shape[:2], CODES[mask.dtype])
        strides = (told.mask_stride_b, told.mask_stride_n, told.mask_stride_k)
        assert strides == (mask.stride(0), mask.stride(1), mask.stride(4))
    if pair is not None:
        assert (told.pair_batch, told.pair_heads, told.pair_dtype) == (*pair.shape[0::2][:2], CODES[pair.dtype])
        strides = (told.pair_stride_b, told.pair_stride_h, told.pair_stride_q)
        assert strides == (pair.stride(0), pair.stride(2), pair.stride(3))
    if gate is not None:
        strides = told.gate_stride
        assert (strides.b, strides.n, strides.l, strides.h) == gate.stride()[:4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_library_is_told_of_the_tensors_of_each_call(stub, dtype):
    record = Record(stub, "sm80")
    for scale, variants in ((0.5, VARIANTS), (0.25, reversed(VARIANTS)), (0.5, VARIANTS[::7])):
        for layout, mask_kind, pair_kind, gate_kind in variants:
            *tensors, do = make(layout, mask_kind, pair_kind, gate_kind, dtype)
            mask, pair, gate = tensors[3:]
            o, lse = stub.forward(*tensors, scale)
            told = record.params
            check_told(told, *tensors, scale)
            assert (told.o, told.lse) == (o.data_ptr(), lse.data_ptr())
            assert told.d_o is None and told.dq is None and told.dpair_bias is None
            wanted = (True, True, True, mask is not None and mask.dtype != torch.bool, pair is not None)
            wanted = (*wanted, gate is not None)
            dq, dk, dv, dmask, dpair, dgate = stub.backward(do, *tensors, o, lse, scale, wanted)
            told = record.params
            check_told(told, *tensors, scale)
            assert (told.o, told.lse, told.d_o) == (o.data_ptr(), lse.data_ptr(), do.data_ptr())
            assert (told.dq, told.dk, told.dv) == (dq.data_ptr(), dk.data_ptr(), dv.data_ptr())
            strides = told.d_o_stride
            assert (strides.b, strides.n, strides.l, strides.h) == do.stride()[:4]
            assert (told.dmask_bias is not None, told.dpair_bias is not None) == wanted[3:5]
            assert told.d_gate == address(dgate)
            finished = pair is not None and pair_kind != "one_head" and pair.dtype != torch.float32
            assert told.dpair_out == (dpair.data_ptr() if finished else None)
            for gradient, x in zip((dq, dk, dv, dmask, dpair, dgate), tensors, strict=True):
                assert gradient is None or (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
                assert gradient is None or gradient.is_contiguous()


def test_each_tensor_has_a_layout_of_its_own(stub):
    layouts = ("contiguous", "packed_qkv", "heads_first")
    of = {layout: make(layout, "none", "none") for layout in layouts}
    for of_q, of_k, of_v, of_do in itertools.product(layouts, repeat=4):
        tensors = (of[of_q][0], of[of_k][1], of[of_v][2], None, None, of[of_do][0])  # the last one is the gate
        o, lse = stub.forward(*tensors, 0.5)
        check_told(Record(stub, "sm80").params, *tensors, 0.5)
        stub.backward(of[of_do][6], *tensors, o, lse, 0.5, (True, True, True, False, False, True))
        told = Record(stub, "sm80").params
        check_told(told, *tensors, 0.5)
        assert (told.d_o_stride.n, told.d_o_stride.l, told.d_o_stride.h) == of[of_do][6].stride()[1:4]


def test_only_wanted_gradients_get_memory(stub):
    *tensors, do = make("contiguous", "additive", "contiguous", "contiguous")
    o, lse = stub.forward(*tensors, 0.5)
    record = Record(stub, "sm80")
    for wanted in itertools.product((False, True), repeat=6):
        gradients = stub.backward(do, *tensors, o, lse, 0.5, wanted)
        assert tuple(x is not None for x in gradients) == wanted
        told = record.params
        kv = wanted[1] or wanted[2]  # they come together
        outputs = (told.dq, told.dk, told.dv, told.dmask_bias, told.dpair_bias, told.d_gate)
        got = [x is not None for x in outputs]
        assert got == [wanted[0], kv, kv, *wanted[3:]]


@pytest.mark.parametrize(
    ("path", "splits", "dtype", "heads", "shares", "finished"),
    [
        ("sm80", 1, torch.bfloat16, 2, True, True),
        ("sm80", 1, torch.float32, 2, True, False),
        ("sm90", 2, torch.bfloat16, 2, True, True),
        ("sm90", 1, torch.bfloat16, 2, False, True),  # the kernel rounds by itself: no fp32 copy of the gradient
        ("sm90", 1, torch.bfloat16, 1, True, False),  # torch adds up the heads
    ],
)
def test_who_adds_up_the_pair_gradient(stub, monkeypatch, path, splits, dtype, heads, shares, finished):
    q, k, v, mask, pair, _ = make_tensors()
    pair = pair[:, :, :heads].to(dtype).contiguous()
    functions = stub._of(path)
    monkeypatch.setattr(functions, "dpair_splits", lambda *arguments: splits)
    scale = 0.5 + splits / 64  # a plan of its own
    o, lse = stub.forward(q, k, v, mask, pair, None, scale, path=path)
    wanted = (False, False, False, False, True, False)
    *_, dpair, _ = stub.backward(o, q, k, v, mask, pair, None, o, lse, scale, wanted, path=path)
    told = Record(stub, path).params
    assert (told.dpair_bias is not None, told.dpair_out is not None) == (shares, finished)
    assert (dpair.shape, dpair.dtype) == (pair.shape, pair.dtype)


def late(x):
    """x, contiguous, but one element behind an aligned address."""
    memory = x.new_empty(x.numel() + 1)[1:]
    return memory.view(x.shape).copy_(x)


@pytest.mark.parametrize("layout", ["contiguous", "unaligned", "strided_last"])
@pytest.mark.parametrize("starts_late", ["none", "q", "k", "v", "pair_bias", "gate", "do", "o"])
def test_what_the_kernels_cannot_read_is_copied(stub, layout, starts_late):
    gate = "unaligned" if layout == "unaligned" else "contiguous"
    *tensors, do = make(layout, "additive", "contiguous", gate)
    # Known, and readable where it starts.
    stub.forward(*make("contiguous", "additive", "contiguous", "contiguous")[:6], 0.5)
    names = ("q", "k", "v", "mask_bias", "pair_bias", "gate")
    tensors = [late(x) if name == starts_late else x for name, x in zip(names, tensors, strict=True)]
    o, lse = stub.forward(*tensors, 0.5)
    o = late(o) if starts_late == "o" else o
    do = late(do) if starts_late == "do" else do
    record = Record(stub, "sm80")
    addresses = [record.params.q, record.params.k, record.params.v, record.params.pair_bias, record.params.gate]
    stub.backward(do, *tensors, o, lse, 0.5, EVERY)
    told = record.params
    for at in (*addresses, told.q, told.k, told.v, told.pair_bias, told.gate, told.d_o, told.o):
        assert at % 16 == 0
    for strides in (told.q_stride, told.k_stride, told.v_stride, told.gate_stride, told.d_o_stride):
        assert all(stride % 8 == 0 for stride in (strides.b, strides.n, strides.l, strides.h))
    if layout == "contiguous":  # nothing else is copied
        by_name = {name: getattr(told, name) for name in ("q", "k", "v", "pair_bias", "gate", "o")} | {"do": told.d_o}
        given = dict(zip(names, tensors, strict=True), do=do, o=o)
        assert {name for name in by_name if by_name[name] != address(given[name])} == {starts_late} - {"none"}


def repeated(x, axis):
    """x with its first part along `axis` in place of all, as an expanded view."""
    return x.narrow(axis, 0, 1).expand(x.shape)


@pytest.mark.parametrize(("path", "copied"), [("sm80", False), ("sm90", True)])
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("which", ["q", "k", "v", "gate", "do"])
def test_only_the_copy_engine_needs_a_copy_of_repeated_rows(stub, path, copied, axis, which):
    shape = AttentionShape("batched", 2, 3, 16, 24, 2, 8, "every axis above 1")
    inputs = make_inputs(shape, torch.bfloat16, gate="contiguous")
    tensors = {name: getattr(inputs, name).detach() for name in ("q", "k", "v", "gate", "do")}
    tensors[which] = repeated(tensors[which], axis)
    *qkv, gate, do = tensors.values()
    biases = (inputs.mask_bias.detach(), inputs.pair_bias.detach())
    o, lse = stub.forward(*qkv, *biases, gate, 0.5, path)
    stub.backward(do, *qkv, *biases, gate, o, lse, 0.5, EVERY, path)
    told = Record(stub, path).params
    for name, at, strides in (
        ("q", told.q, told.q_stride),
        ("k", told.k, told.k_stride),
        ("v", told.v, told.v_stride),
        ("gate", told.gate, told.gate_stride),
        ("do", told.d_o, told.d_o_stride),
    ):
        is_copied = copied and name == which and name != "gate"  # which the kernels read themselves
        assert (at != address(tensors[name])) == is_copied, name
        expected = tensors[name].contiguous() if is_copied else tensors[name]
        assert (strides.b, strides.n, strides.l, strides.h) == expected.stride()[:4]


@pytest.mark.parametrize(("path", "copied"), [("sm80", False), ("sm90", True)])
def test_only_the_copy_engine_needs_a_copy_of_a_pair_bias_with_one_query(stub, path, copied):
    q, k, v, mask, pair, gate = make_tensors()
    pair = repeated(pair, 3)
    o, lse = stub.forward(q, k, v, mask, pair, gate, 0.5, path)
    stub.backward(o, q, k, v, mask, pair, gate, o, lse, 0.5, EVERY, path)
    told = Record(stub, path).params
    assert (told.pair_bias != address(pair)) == copied
    assert told.pair_stride_q == (24 if copied else 0)


def test_strides_of_axes_of_one_element_are_not_looked_at(stub):
    q, *others = make_tensors(heads=1)
    q = torch.as_strided(q, q.shape, (0, q.stride(1), q.stride(2), 3, 1))
    stub.forward(q, *others, 0.5, "sm90")
    assert Record(stub, "sm90").params.q == address(q)


def test_the_copy_engine_takes_strides_below_2_to_the_40_bytes():
    shape, dtype = (2, 8), torch.bfloat16
    assert _layout.is_readable(shape, (2**39 - 8, 1), dtype, by_copy_engine=True)
    assert not _layout.is_readable(shape, (2**39, 1), dtype, by_copy_engine=True)
    assert _layout.is_readable(shape, (2**39, 1), dtype)


def test_sm90_calls_its_own_kernels(stub, monkeypatch):
    monkeypatch.setattr(sm90, "extension", lambda: stub)
    record, inputs = Record(stub, "sm90"), make_tensors()
    (forwards, backwards) = record.calls
    o, lse = sm90.SM90.forward(*inputs, 0.5)
    gradients = sm90.SM90.backward(o, *inputs, o, lse, 0.5, EVERY)
    assert record.calls == (forwards + 1, backwards + 1)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def test_a_head_dim_of_no_whole_16_bytes_is_padded(stub):
    inputs = make_tensors(head_dim=5)
    o, lse = stub.forward(*inputs, 0.5)
    assert o.shape == inputs[0].shape and o.is_contiguous()
    assert Record(stub, "sm80").params.head_dim == 8
    gradients = stub.backward(o, *inputs, o, lse, 0.5, EVERY)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


def test_keys_of_no_whole_16_bytes_get_longer_rows_in_the_pair_bias(stub):
    inputs = make_tensors(k_len=21)
    o, lse = stub.forward(*inputs, 0.5)
    told = Record(stub, "sm80").params
    assert (told.pair_stride_q, told.k_len) == (24, 21) and told.pair_bias != address(inputs[4])
    assert stub.backward(o, *inputs, o, lse, 0.5, EVERY)[4].shape == inputs[4].shape


@pytest.mark.parametrize("current", [0, 1])
def test_a_cuda_call_goes_to_the_tensors_device_and_its_current_stream(stub, monkeypatch, current):
    """What is left to do on a GPU, with torch's CUDA functions stood in for."""
    tensors = make_tensors()
    o, lse = stub.forward(*tensors, 0.5)
    plan = stub._plan(layout_of(*tensors, 0.5), "sm80")
    params = with_addresses(plan.params, *tensors, o, lse)
    entered, empty = [], torch.empty

    @contextmanager
    def device(given):
        entered.append(given)
        yield

    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current, raising=False)
    on_second_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), shape=(1,), dtype=torch.bfloat16)
    stub._run(plan.functions.fwd, plan, params, on_second_gpu)
    assert Record(stub, "sm80").params.stream == 1001
    assert entered == ([] if current == 1 else [torch.device("cuda", 1)])

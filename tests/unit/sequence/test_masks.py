# SPDX-License-Identifier: Apache-2.0
"""The mask factory: what it builds, where, and how much memory that takes; the threshold command."""

import json
import math
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_ds4sci.sequence import masks
from deepspeed_ds4sci.sequence.attention import SequenceParallelAttention
from deepspeed_ds4sci.sequence.layout import Layout
from deepspeed_ds4sci.sequence.mask_threshold import Measurement, choose_threshold, main, measure, write_threshold
from deepspeed_ds4sci.sequence.masks import MaskFactory
from tests.unit.sequence.cases import block_rule, case_arguments, make_qkv
from tests.unit.sequence.naive_attention import _bias

SEQ_LEN = 24


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(masks, "BLOCK_ROWS", 5)


def expected_keep(batch, heads, **arguments):
    keep = torch.empty(batch, heads, SEQ_LEN, SEQ_LEN, dtype=torch.bool)
    defaults = dict(causal=True, mask=None, alibi_slopes=None, window=None, document_ids=None)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, keep.shape)).tolist():
        keep[b, h, i, j] = _bias(b, h, i, j, **{**defaults, **arguments}) > -math.inf
    return keep


@pytest.mark.parametrize("threshold", [SEQ_LEN, SEQ_LEN - 1], ids=["device", "cpu"])
@pytest.mark.parametrize(
    "case", ["causal", "bidirectional", "window_pair", "documents", "padding", "mask_rule", "mask"]
)
def test_masks_are_the_definition_and_slices_are_their_rows(case, threshold):
    arguments = case_arguments(case, 2, SEQ_LEN, 4)
    given = dict(arguments)
    custom = given.pop("mask", None)
    factory = MaskFactory(cpu_threshold=threshold)
    heads = 4 if callable(custom) else 1
    whole = factory(SEQ_LEN, custom=custom, heads=(0, heads), **given)
    if callable(custom):  # the sample is known only from another input; here there is none
        whole = whole.expand(2, -1, -1, -1).clone()
        whole[1] = factory(SEQ_LEN, custom=lambda b, h, i, j: custom(b + 1, h, i, j), heads=(0, heads), **given)[0]
    assert torch.equal(whole.expand(2, 4, -1, -1), expected_keep(2, 4, **arguments))
    if callable(custom):
        return
    for size, mode in ((2, "ring"), (3, "ulysses"), (4, {"ulysses": 2, "ring": 2})):
        layout = Layout(SEQ_LEN, size, mode)
        for rank in range(size):
            for ranges, rows in (
                (layout.ranges(rank), layout.positions(rank)),
                (layout.attention_ranges(rank), layout.attention_positions(rank)),
            ):
                assert torch.equal(factory(SEQ_LEN, ranges, custom=custom, **given), whole[:, :, rows])
                if custom is not None:  # a custom mask that holds the wanted rows alone
                    assert torch.equal(factory(SEQ_LEN, ranges, custom=custom[:, :, rows], **given), whole[:, :, rows])


def test_float_masks_add_to_a_bias():
    bias = torch.randn(1, 3, SEQ_LEN, SEQ_LEN)
    built = MaskFactory(dtype=torch.float32)(SEQ_LEN, custom=bias, causal=True)
    keep = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
    assert torch.equal(built, torch.where(keep, bias, -math.inf))
    built = MaskFactory(dtype=torch.bfloat16)(SEQ_LEN, window=3)
    assert built.dtype == torch.bfloat16 and set(built.unique().tolist()) == {0.0, -math.inf}
    assert torch.equal(built == 0, MaskFactory()(SEQ_LEN, window=3))


def test_padding_mask_is_a_document_that_sees_nothing():
    tokens = torch.ones(2, SEQ_LEN, dtype=torch.int64)
    tokens[1, 20:] = 0
    documents = torch.arange(SEQ_LEN).div(10, rounding_mode="floor").repeat(2, 1)
    built = MaskFactory()(SEQ_LEN, causal=False, document_ids=documents, padding_mask=tokens)
    joined = documents.masked_fill(tokens == 0, -1)
    assert torch.equal(built.expand(2, 1, -1, -1), expected_keep(2, 1, causal=False, document_ids=joined))
    alone = MaskFactory()(SEQ_LEN, causal=False, padding_mask=tokens)
    assert alone[0].all() and not alone[1, :, 20:].any() and not alone[1, :, :, 20:].any()


def test_a_built_mask_gives_the_attention_of_its_rules():
    *qkv, _ = make_qkv(2, SEQ_LEN, 4, 2, 8)
    arguments = case_arguments("documents", 2, SEQ_LEN, 4)
    built = MaskFactory()(SEQ_LEN, **arguments)
    attention = SequenceParallelAttention()
    expected = attention(*qkv, **arguments)
    torch.testing.assert_close(attention(*qkv, causal=False, mask=built), expected, rtol=1e-6, atol=1e-6)


class Devices(TorchDispatchMode):
    """Bytes of the tensors that operations make, by device; and copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.largest, self.copies = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            size = result.numel() * result.element_size()
            self.largest[result.device.type] = max(self.largest.get(result.device.type, 0), size)
            source = args[0].device if args and isinstance(args[0], torch.Tensor) else result.device
            self.copies += source != result.device
        return result


def test_above_the_threshold_everything_is_on_the_cpu_but_one_transfer():
    # "meta" stands for the device: it takes part in dispatch as any other.
    with Devices() as above:
        mask = MaskFactory("meta", cpu_threshold=SEQ_LEN - 1)(SEQ_LEN, window=4)
    assert mask.device.type == "meta" and above.copies == 1
    assert above.largest == {"cpu": 5 * SEQ_LEN * 8, "meta": SEQ_LEN**2}  # int64 distances of a block of rows
    with Devices() as below:
        mask = MaskFactory("meta", cpu_threshold=SEQ_LEN)(SEQ_LEN, window=4)
    assert mask.device.type == "meta" and below.copies == 0 and "cpu" not in below.largest


def test_no_temporary_is_larger_than_a_block_of_rows():
    seq_len = 400
    with Devices() as made:
        MaskFactory(dtype=torch.float32)(
            seq_len, ((0, 100),), causal=True, document_ids=torch.zeros(1, seq_len).long()
        )
    assert made.largest["cpu"] == 4 * 100 * seq_len  # the result: wanted rows only
    sizes = Devices()
    with sizes:
        MaskFactory()(seq_len, window=7)
    assert sizes.largest["cpu"] == seq_len**2 > 5 * seq_len * 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaskFactory(cpu_threshold=0), "cpu_threshold must be at least 1 token, got 0"),
        (lambda: MaskFactory(dtype=torch.int8), "dtype must be torch.bool or a float dtype, got torch.int8"),
        (lambda: MaskFactory()(8, ((4, 9),)), r"rows must be ranges within \[0, 8\), got \(\(4, 9\),\)"),
        (lambda: MaskFactory()(8, document_ids=torch.zeros(1, 7)), r"document_ids must be .* S = 8, got \[1, 7\]"),
        (lambda: MaskFactory()(8, padding_mask=torch.zeros(8)), r"padding_mask must be .* S = 8, got \[8\]"),
        (lambda: MaskFactory()(8, custom=torch.zeros(1, 1, 3, 8)), r"custom must be .* got \[1, 1, 3, 8\]"),
        (
            lambda: MaskFactory()(8, custom=torch.zeros(1, 1, 8, 8)),
            "must be bool for a mask of torch.bool, got torch.f",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_rule_may_be_asked_for_heads():
    built = MaskFactory()(SEQ_LEN, causal=False, custom=block_rule, heads=(0, 2))
    assert built.shape == (1, 2, SEQ_LEN, SEQ_LEN) and built[:, 0].all() and not built[:, 1].all()


MEASURED = [
    Measurement(1024, 0.001, 2**20, 0.01, 2**20),
    Measurement(4096, 0.002, 2**24, 0.02, 2**24),
    Measurement(8192, 0.05, 2**26, 0.04, 2**26),
    Measurement(16384, 0.06, 2**28, 0.07, 2**28),
]


def test_the_threshold_is_the_last_length_before_the_device_loses():
    assert choose_threshold(MEASURED) == 4096
    assert choose_threshold(MEASURED[::-1]) == 4096
    assert choose_threshold([*MEASURED[:1], Measurement(2048, None, 0, 1.0, 0)]) == 1024
    assert choose_threshold([Measurement(2048, 1.0, 0, None, 0)]) == 2048
    with pytest.raises(ValueError, match="no measured length is built faster on the device"):
        choose_threshold(MEASURED[2:])


def test_the_command_measures_and_writes(tmp_path, capsys):
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({"train_batch_size": 4, "ds4sci": {"attention_mask": {"kind": "document"}}}))
    assert main([str(config), "--reserve-gib", "2"], measure=lambda device, lengths, reserve: MEASURED) == 0
    assert json.loads(config.read_text()) == {
        "train_batch_size": 4,
        "ds4sci": {"attention_mask": {"kind": "document", "cpu_threshold": 4096}},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["ds_config.json"]
    out = capsys.readouterr().out
    assert "cpu_threshold = 4096 tokens" in out and "16384" in out
    plain = tmp_path / "plain.json"
    plain.write_text("{}")
    write_threshold(plain, 7)
    assert json.loads(plain.read_text()) == {"ds4sci": {"attention_mask": {"cpu_threshold": 7}}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*: No such file"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"ds4sci": 3}', "ds4sci in .* must be a JSON object, got 3"),
    ],
)
def test_the_command_refuses_bad_files(text, message, tmp_path, capsys):
    config = tmp_path / "ds_config.json"
    if text is not None:
        config.write_text(text)
    assert main([str(config)], measure=lambda *_: MEASURED) == 2
    assert re.search(message, capsys.readouterr().err)
    assert text is None or config.read_text() == text


def test_measuring_needs_a_gpu():
    with pytest.raises(NotImplementedError, match="a property of a CUDA GPU, got device cpu"):
        measure("cpu")


def test_the_command_says_that_there_is_no_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tmp_path / "ds_config.json"
    config.write_text("{}")
    assert main([str(config)]) == 2
    assert "a CUDA GPU, and torch sees none here" in capsys.readouterr().err
    assert config.read_text() == "{}"

# SPDX-License-Identifier: Apache-2.0
"""Masks that the config asks for, on one rank: each is the naive mask, made where the threshold says."""

import pytest
import torch

from deepspeed_ds4sci.hooks import attention_mask
from deepspeed_ds4sci.sequence import blocks, scores
from deepspeed_ds4sci.sequence.inputs import ShardedBatch
from deepspeed_ds4sci.sequence.layout import Layout
from tests.distributed import tiny_models
from tests.helpers import mask_rules
from tests.helpers.naive_masks import naive_mask
from tests.unit.hooks.apply import assert_trains_like, differs, with_hooks

LENGTHS = [16, 11]
DOCUMENTS = torch.arange(16).ge(6).long().expand(2, -1)
OF_THE_BATCH = {"attention_mask": torch.ones(1, 1, 16, 16, dtype=torch.bool)}
CAUSAL_MODELS = ("llama", "gpt_neox", "gpt2", "genslm-rotary")


def batch_of(name, padding=False, documents=False):
    batch = tiny_models.batch(name, 2, 16, 0)
    if padding:
        batch = tiny_models.with_padding(batch, LENGTHS)
    if documents and name.startswith("genslm"):
        batch["document_ids"] = DOCUMENTS
    elif documents:
        batch["position_ids"] = torch.arange(16).where(DOCUMENTS[0] == 0, torch.arange(16) - 6)[None]
    return batch


def explicit(batch, mask):
    """What a plain model is given in place of `batch`. GenSLM counts no label past a document's end by itself."""
    return {**{name: value for name, value in batch.items() if name != "attention_mask"}, "attention_mask": mask}


@pytest.mark.parametrize("name", CAUSAL_MODELS)
@pytest.mark.parametrize("threshold", [8, 16])
def test_causal_with_padding(name, threshold):
    model, batch = tiny_models.build(name), batch_of(name, padding=True)
    ours, lines, _ = with_hooks(model, attention_mask={"kind": "causal", "cpu_threshold": threshold})
    assert f"explicit causal mask, built on the device up to {threshold} tokens" in lines[0]
    assert_trains_like(ours, batch, model, explicit(batch, naive_mask(16, lengths=LENGTHS, batch=2)))


@pytest.mark.parametrize("padding", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("name", [*CAUSAL_MODELS, "genslm-encoder"])
def test_documents(name, padding):
    model, batch = tiny_models.build(name), batch_of(name, padding, documents=True)
    ours, *_ = with_hooks(model, attention_mask={"kind": "document"})
    mask = naive_mask(
        16, causal="encoder" not in name, documents=DOCUMENTS, lengths=LENGTHS if padding else None, batch=2
    )
    assert_trains_like(ours, batch, model, explicit(batch, mask))
    one_document = {name: value for name, value in batch.items() if name != "document_ids"}
    assert differs(ours, batch, model, explicit(one_document, naive_mask(16, causal="encoder" not in name, batch=2)))


@pytest.mark.parametrize("name", ["llama", "genslm-rotary", "genslm-encoder"])
@pytest.mark.parametrize("rule", [mask_rules.near_or_global, mask_rules.strided_by_head])
def test_a_rule_from_the_config_and_one_from_the_batch(name, rule):
    model, batch = tiny_models.build(name), batch_of(name)
    mask = naive_mask(16, causal="encoder" not in name, rule=torch_rule(rule), batch=2, heads=tiny_models.HEADS)
    named, *_ = with_hooks(
        model, attention_mask={"kind": "custom", "rule": f"tests.helpers.mask_rules:{rule.__name__}"}
    )
    assert_trains_like(named, batch, model, explicit(batch, mask))
    given, *_ = with_hooks(model, attention_mask={"kind": "custom"})
    assert_trains_like(given, {**batch, "attention_mask": rule}, model, explicit(batch, mask))


def torch_rule(rule):
    return lambda *numbers: rule(*(torch.tensor(number) for number in numbers))


@pytest.mark.parametrize("name", ["llama", "genslm-rotary"])
@pytest.mark.parametrize("heads", [1, tiny_models.HEADS])
def test_a_mask_of_the_batch(name, heads):
    """For transformers it says everything; for GenSLM causality holds beside it."""
    model, batch = tiny_models.build(name), batch_of(name)
    mask = (torch.rand(2, heads, 16, 16) < 0.5) | torch.eye(16, dtype=torch.bool)
    batch = {**batch, "attention_mask": mask}
    for kept in (mask, torch.where(mask, 0.0, float("-inf"))):
        ours, *_ = with_hooks(model, attention_mask={"kind": "custom"}, attention={"implementation": "math"})
        assert_trains_like(ours, {**batch, "attention_mask": kept}, model, batch)


def test_a_window_is_part_of_the_mask():
    model, batch = tiny_models.build("llama"), batch_of("llama")
    ours, *_ = with_hooks(model, attention={"sliding_window": 4}, attention_mask={"kind": "causal"})
    assert_trains_like(ours, batch, model, explicit(batch, naive_mask(16, window=4, batch=2)))
    ours, *_ = with_hooks(
        tiny_models.build("genslm-rotary"), attention={"sliding_window": 4}, attention_mask={"kind": "causal"}
    )
    plain, *_ = with_hooks(tiny_models.build("genslm-rotary"), attention={"sliding_window": 4})
    assert_trains_like(ours, batch, plain, batch)


DIAGONAL, BESIDE, BELOW = 4, 3, 3  # of four by four tiles, the others of which are above the diagonal


@pytest.mark.parametrize(
    "name, block, attention, tiles",
    [
        ("genslm-rotary", {"kind": "causal"}, {}, DIAGONAL + BESIDE + BELOW),
        ("genslm-rotary", {"kind": "document"}, {"implementation": "tiled"}, DIAGONAL + BESIDE + BELOW),
        ("genslm-rotary", {"kind": "custom", "rule": "tests.helpers.mask_rules:near_or_global"}, {}, 10),
        ("genslm-rotary", {"kind": "causal"}, {"sliding_window": 5}, DIAGONAL + BESIDE),
        ("genslm-rotary", {"kind": "causal"}, {"sliding_window": 6}, DIAGONAL + BESIDE + 2),
        ("llama", {"kind": "causal"}, {"sliding_window": 1}, DIAGONAL),
        ("genslm-encoder", {"kind": "document"}, {"sliding_window": 5}, DIAGONAL + 2 * BESIDE),
        ("genslm-encoder", {"kind": "document"}, {}, 16),
        ("genslm-rotary", {"kind": "causal"}, {"implementation": "math"}, 0),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) and "kind" in value else None,
)
def test_tiles_that_causality_or_a_window_empties_are_left_out(monkeypatch, name, block, attention, tiles):
    """Forward and backward; "math", which is told the mask alone, gives the same."""
    batch = batch_of(name, documents=block["kind"] == "document")
    assert_tiles(monkeypatch, name, block, attention, batch, tiles)


@pytest.mark.parametrize("name, tiles", [("genslm-rotary", DIAGONAL + 2), ("genslm-encoder", 8)])
def test_tiles_between_documents_are_left_out(monkeypatch, name, tiles):
    monkeypatch.setattr(scores, "DOCUMENT_BLOCK", 4)
    batch = {**batch_of(name), "document_ids": torch.arange(16).ge(8).long().expand(2, -1)}
    assert_tiles(monkeypatch, name, {"kind": "document"}, {}, batch, tiles)


def assert_tiles(monkeypatch, name, block, attention, batch, tiles):
    """Trains like "math", and computes so many tiles of four by four tokens of each layer, forward and backward."""
    model = tiny_models.build(name)
    ours, *_ = with_hooks(model, attention_mask=block, attention=attention)
    plain, *_ = with_hooks(model, attention_mask=block, attention={**attention, "implementation": "math"})
    computed = []

    def counted(function):
        tile = getattr(blocks, function)
        monkeypatch.setattr(blocks, function, lambda *arguments: computed.append(function) or tile(*arguments))

    counted("_tile_forward"), counted("_tile_backward")
    monkeypatch.setattr(blocks, "TILE", 4)
    assert_trains_like(ours, batch, plain, batch)
    for function in ("_tile_forward", "_tile_backward"):
        assert computed.count(function) == tiles * tiny_models.LAYERS


def test_a_mask_that_says_all_may_look_ahead():
    """transformers' models take a mask of the batch for all that there is to say."""
    model, batch = tiny_models.build("llama"), batch_of("llama")
    ours, *_ = with_hooks(model, attention_mask={"kind": "custom"})
    both_ways = {**batch, "attention_mask": torch.ones(1, 1, 16, 16, dtype=torch.bool)}
    assert_trains_like(ours, both_ways, model, both_ways)


def asked_within_13(batch, head, query, key):
    return mask_rules.strided_by_head(batch, head, query.clamp(max=12), key.clamp(max=12))


@pytest.mark.parametrize(
    "mode, size, rows, heads",
    [("ulysses", 4, 16, 2), ("ring", 4, 4, 5), ({"ulysses": 2, "ring": 2}, 4, 8, 3), ("ring", 2, 8, 5)],
)
def test_a_rank_holds_the_rows_and_heads_that_it_attends_for(mode, size, rows, heads):
    """The samples have 13 tokens; the last three are padding, which sees nothing. Of five heads, four ranks get two,
    two, one and padding, which is given the last one."""
    layout = Layout(16, size, mode)
    for rank in range(size):
        builder = attention_mask.MaskBuilder("custom", 8, None, True, None, 5, rank, True, "position_ids")
        batch = ShardedBatch(layout, 13, 1)
        mine = builder.build(batch, mask_rules.strided_by_head, torch.device("cpu")).mask
        first = min(layout.ulysses_rank(rank) * heads, 4)
        expected = naive_mask(16, rule=torch_rule(asked_within_13), heads=5)[:, first : first + heads]
        assert mine.shape == (1, min(heads, 5 - first), rows, 16)
        assert torch.equal(mine, expected[:, :, layout.attention_positions(rank)])
        given = torch.rand(1, 1, 13, 13) < 0.5
        expected = torch.nn.functional.pad(given, (0, 3, 0, 3))
        mine = builder.build(batch, given, torch.device("cpu")).mask
        assert torch.equal(mine, expected[:, :, layout.attention_positions(rank)])
        of_keys = torch.rand(1, 1, 1, 13) < 0.5
        mine = builder.build(batch, of_keys, torch.device("cpu")).mask
        assert torch.equal(mine, torch.nn.functional.pad(of_keys, (0, 3)).expand(1, 1, rows, 16))


def test_a_rule_is_asked_where_the_mask_is_built_and_about_its_own_tokens_alone():
    table = torch.rand(13, device="meta")
    asked = []

    def rule(batch, head, query, key):
        asked.append({x.device.type for x in (batch, head, query, key)})
        return table[query] > table[key]

    builder = attention_mask.MaskBuilder("custom", 16, rule, True, None, 5, 0, True, "position_ids")
    builder.build(ShardedBatch(Layout(16, 1, "ulysses"), 13, 1), rule, torch.device("meta"))
    assert asked and all(devices == {"meta"} for devices in asked)
    lengths = []

    def recording(batch, head, query, key):
        lengths.append((int(query.max()), int(key.max())))
        return query >= key

    builder.build(ShardedBatch(Layout(16, 1, "ulysses"), 13, 1), recording, torch.device("cpu"))
    assert max(lengths) == (12, 12)


@pytest.mark.parametrize("threshold, where", [(15, "cpu"), (16, "meta")])
def test_the_threshold_decides_where_it_is_built_and_a_causal_mask_is_built_once(monkeypatch, threshold, where):
    """The device of these tests is the CPU, so a stand-in for another one shows which of the two is taken."""
    built = []

    class Recorded(attention_mask.MaskFactory):
        def __call__(self, seq_len, *args, **kwargs):
            built.append(attention_mask.MaskFactory("meta", self.cpu_threshold).build_device(seq_len).type)
            return super().__call__(seq_len, *args, **kwargs)

    monkeypatch.setattr(attention_mask, "MaskFactory", Recorded)
    ours, _, context = with_hooks(
        tiny_models.build("llama"), attention_mask={"kind": "causal", "cpu_threshold": threshold}
    )
    for _ in range(2):
        ours(**batch_of("llama"))
    assert built == [where]
    assert context.sequence.batch.mask.shape == (1, 1, 16, 16)
    ours(**batch_of("llama", padding=True))
    assert len(built) == 2 and context.sequence.batch.mask.shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    "name, block, batch, message",
    [
        ("llama", {"kind": "document"}, {}, r'kind = "document" needs position_ids in the batch, got .*input_ids'),
        ("genslm-rotary", {"kind": "document"}, {}, r'kind = "document" needs document_ids in the batch'),
        (
            "llama",
            {"kind": "causal"},
            OF_THE_BATCH,
            'has no place for; use "custom"',
        ),
        ("llama", {"kind": "custom"}, {}, r'kind = "custom" needs a rule in the config, or an attention_mask'),
        (
            "llama",
            {"kind": "custom", "rule": "tests.helpers.mask_rules:near_or_global"},
            OF_THE_BATCH,
            "beside ds4sci.attention_mask.rule; leave one",
        ),
        (
            "llama",
            {"kind": "custom"},
            {"attention_mask": torch.ones(1, 1, 16, 17).bool()},
            r"attention_mask must be \[B\|1, H\|1, S, S\] with S = 16, got \[1, 1, 16, 17\]",
        ),
        (
            "llama",
            {"kind": "custom"},
            {"attention_mask": torch.ones(1, 1, 8, 8).bool()},
            r"attention_mask must be \[B\|1, H\|1, S, S\] with S = 16, got \[1, 1, 8, 8\]",
        ),
    ],
)
def test_refuses_a_batch_that_does_not_fit(name, block, batch, message):
    ours, *_ = with_hooks(tiny_models.build(name), attention_mask=block)
    with pytest.raises(ValueError, match=message):
        ours(**batch_of(name), **batch)


@pytest.mark.parametrize(
    "name, features, error, message",
    [
        (
            "esm",
            {"attention_mask": {"kind": "causal"}},
            ValueError,
            "EsmForMaskedLM, which attends both ways",
        ),
        (
            "llama",
            {"attention_mask": {"kind": "causal"}, "attention": {"implementation": "flash"}},
            NotImplementedError,
            'ds4sci.attention.implementation: "flash" does not support mask; "tiled" does',
        ),
        (
            "llama",
            {"attention_mask": {"kind": "custom", "rule": "tests.helpers.mask_rules:nothing"}},
            ValueError,
            "rule = 'tests.helpers.mask_rules:nothing' cannot be loaded: module .* has no attribute",
        ),
        (
            "llama",
            {"attention_mask": {"kind": "custom", "rule": "no.such.module:rule"}},
            ValueError,
            "cannot be loaded: No module named 'no'",
        ),
        (
            "llama",
            {"attention_mask": {"kind": "custom", "rule": "tests.helpers.mask_rules:not_a_function"}},
            ValueError,
            "is no function, got int",
        ),
    ],
)
def test_refuses_at_start_what_cannot_work(name, features, error, message):
    with pytest.raises(error, match=message):
        with_hooks(tiny_models.build(name), **features)


def test_a_function_needs_the_kind_custom():
    ours, *_ = with_hooks(tiny_models.build("llama"), attention={"implementation": "tiled"})
    with pytest.raises(ValueError, match='a function needs ds4sci.attention_mask.kind = "custom" for Llama'):
        ours(**batch_of("llama"), attention_mask=mask_rules.near_or_global)

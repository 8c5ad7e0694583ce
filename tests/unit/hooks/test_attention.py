# SPDX-License-Identifier: Apache-2.0
"""Another attention in a model whose sequences one rank has whole: the same training, by the named implementation."""

import copy
import sys
import types

import pytest
import torch

from deepspeed_ds4sci.hooks import attention
from deepspeed_ds4sci.sequence import local_attention
from tests.distributed import tiny_models
from tests.helpers.naive_masks import naive_mask
from tests.unit.hooks.apply import assert_trains_like, differs, with_hooks

MODELS = ("llama", "gpt_neox", "gpt2", "esm", "genslm-rotary")
LENGTHS = [16, 11]


def padded(name):
    return tiny_models.with_padding(tiny_models.batch(name, 2, 16, 0), LENGTHS)


@pytest.mark.parametrize("implementation", ["math", "tiled", "flash"])
@pytest.mark.parametrize("name", MODELS)
def test_trains_like_the_models_own_attention(name, implementation):
    model = tiny_models.build(name)
    batch = tiny_models.batch(name, 2, 16, 0) if implementation == "flash" else padded(name)
    ours, lines, _ = with_hooks(model, attention={"implementation": implementation})
    assert f"attend by {implementation!r}" in lines[0]
    assert_trains_like(ours, batch, model, batch)


@pytest.mark.parametrize("name", MODELS)
def test_a_sliding_window_is_the_models_attention_under_an_explicit_mask(name):
    model, batch = tiny_models.build(name), padded(name)
    ours, lines, _ = with_hooks(model, attention={"sliding_window": 4})
    assert "each token over 4 tokens" in lines[0]
    mask = naive_mask(16, causal=name != "esm", window=4, lengths=LENGTHS, batch=2)
    if name == "esm":  # its embeddings look at padding
        theirs = explicit_esm(copy.deepcopy(model), mask)
        assert_trains_like(ours, batch, theirs, batch)
    else:
        assert_trains_like(ours, batch, model, {**batch, "attention_mask": mask})
    assert differs(ours, batch, model, batch)


def explicit_esm(model, mask):
    """The model with a mask for its attention, beside the padding mask for its embeddings."""
    model.base_model._create_attention_masks = lambda **_: (mask, None)
    return model


def test_documents_are_told_by_position_ids_as_in_transformers():
    model = tiny_models.build("llama")
    ours, *_ = with_hooks(model, attention={"implementation": "tiled"})
    batch = {**tiny_models.batch("llama", 2, 16, 0), "position_ids": torch.arange(16).remainder(6)[None]}
    for cache in (False, True):
        assert_trains_like(ours, {**batch, "use_cache": cache}, model, {**batch, "use_cache": cache})


def test_a_mask_in_the_batch_says_everything_as_in_transformers():
    model = tiny_models.build("gpt2")
    ours, *_ = with_hooks(model, attention={"implementation": "math"})
    mask = torch.rand(2, 1, 16, 16) < 0.5
    batch = {**tiny_models.batch("gpt2", 2, 16, 0), "attention_mask": mask | torch.eye(16, dtype=torch.bool)}
    assert_trains_like(ours, batch, model, batch)


def test_evaluation_gives_the_logits_of_the_model():
    model = tiny_models.build("llama").eval()
    ours, *_ = with_hooks(model, attention={"implementation": "tiled"})
    tokens = tiny_models.batch("llama", 2, 16, 0)["input_ids"]
    with torch.no_grad():
        assert (ours(tokens).logits - model(tokens).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "features, message",
    [
        ({"implementation": "cudnn"}, '"cudnn" needs a CUDA GPU; "flash", "math" and "tiled" work on the CPU'),
        ({"implementation": "efficient"}, '"efficient" needs a CUDA GPU'),
        ({"implementation": "flex"}, '"flex" has no backward pass on the CPU'),
        ({"implementation": "flash_attn"}, "the package flash_attn cannot be imported"),
        ({"implementation": "flash_attn_4"}, "the package flash-attn-4, which cannot be imported"),
        ({"implementation": "flash", "sliding_window": 3}, '"flash" does not support window; "tiled" does'),
    ],
)
def test_refuses_at_start_what_cannot_run(monkeypatch, features, message):
    for package in ("flash_attn.flash_attn_interface", "flash_attn.cute.interface"):  # where they are installed
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotImplementedError, match=f"ds4sci.attention.implementation: .*{message}"):
        with_hooks(tiny_models.build("llama"), attention=features)


@pytest.mark.parametrize(
    "argument, value", [("past_key_values", object()), ("output_attentions", True)], ids=["cache", "weights"]
)
def test_refuses_arguments_that_it_has_no_answer_to(argument, value):
    ours, *_ = with_hooks(tiny_models.build("gpt2"), attention={"implementation": "math"})
    with pytest.raises(NotImplementedError, match=f"'{argument}' of GPT2LMHeadModel does not go with"):
        ours(**tiny_models.batch("gpt2", 1, 8, 0), **{argument: value})


def test_refuses_to_generate_with_a_cache():
    """At the first token, by the name that the cache has in the installed version, not at the second by its shape."""
    ours, *_ = with_hooks(tiny_models.build("llama"), attention_mask={"kind": "causal"})
    tokens = tiny_models.batch("llama", 1, 8, 0)["input_ids"]
    with pytest.raises(NotImplementedError, match="'(past_key_values|cache)' of LlamaForCausalLM does not go with"):
        ours.eval().generate(tokens, max_new_tokens=2)
    one_by_one = ours.generate(tokens, max_new_tokens=3, do_sample=False, use_cache=False)
    expected = tiny_models.build("llama").eval().generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(one_by_one, expected)


def test_refuses_document_ids_where_the_model_would_ignore_them():
    ours, *_ = with_hooks(tiny_models.build("llama"), attention={"implementation": "math"})
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM takes no document_ids; .* by position_ids"):
        ours(**tiny_models.batch("llama", 1, 8, 0), document_ids=torch.zeros(1, 8, dtype=torch.int64))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "genslm-rotary"])
def test_runs_under_autocast_as_the_models_own_attention(name):
    model, batch = tiny_models.build(name), tiny_models.batch(name, 1, 8, 0)
    ours, *_ = with_hooks(model, attention={"implementation": "math"})
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(**batch).loss, model(**batch).loss, atol=5e-3, rtol=0)


def test_refuses_the_recomputation_of_transformers():
    """Its layers would attend again under the documents or the mask of a later batch."""
    features = {"attention": {"implementation": "tiled"}}
    model, batch = tiny_models.build("llama"), tiny_models.batch("llama", 1, 8, 0)
    ours, *_ = with_hooks(model, **features)
    message = "recomputation that LlamaForCausalLM has of its own .* set ds4sci.activation_checkpointing in the config"
    for each in (ours, model):
        each.gradient_checkpointing_enable()
    with pytest.raises(NotImplementedError, match=message):
        ours(**batch)
    with torch.no_grad():
        ours(**batch)
    ours.eval()(**batch)  # recomputes in training only
    with pytest.raises(NotImplementedError, match=message):
        with_hooks(model, **features)


def test_refuses_a_model_it_does_not_know():
    with pytest.raises(NotImplementedError, match="sequences of Linear cannot be split .* models that can"):
        with_hooks(torch.nn.Linear(2, 2), attention={"implementation": "math"})


def _version_2(q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes):
    """The definition under flash_attn 2's signature: q, k, v [B, S, H, D], window (left, right), -1 for no limit."""
    assert dropout_p == 0 and alibi_slopes is None
    left, right = window_size
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])[None]
    keep = torch.ones_like(distance, dtype=torch.bool)
    keep &= (distance >= 0) if causal else (right < 0) | (-distance <= right)
    keep &= (left < 0) | (distance <= left)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~keep, float("-inf")).softmax(-1), v)


def _version_1(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal):
    """The definition under flash_attn 1's signature: packed tokens [B * S, H, D] with cumulative lengths."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    q, k, v = (x.unflatten(0, (len(cu_seqlens_q) - 1, max_seqlen_q)) for x in (q, k, v))
    return _version_2(q, k, v, dropout_p, softmax_scale, causal, (-1, -1), None).flatten(0, 1)


@pytest.mark.parametrize(
    "functions, window",
    [({"flash_attn_func": _version_2}, 0), ({"flash_attn_func": _version_2}, 4)]
    + [({"flash_attn_unpadded_func": _version_1}, 0)],
    ids=["v2", "v2-window", "v1"],
)
def test_the_package_flash_attn_is_called_by_its_interface(monkeypatch, functions, window):
    """A stand-in with the package's signatures. The package itself needs a GPU."""
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    vars(interface).update(functions)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    real = local_attention.unavailable_reason
    monkeypatch.setattr(attention, "unavailable_reason", lambda name, device: real(name, "cuda"))
    model, batch = tiny_models.build("llama"), tiny_models.batch("llama", 2, 16, 0)
    ours, *_ = with_hooks(model, attention={"implementation": "flash_attn", "sliding_window": window})
    reference = {**batch, "attention_mask": naive_mask(16, window=window or None, batch=2)}
    assert_trains_like(ours, batch, model, reference)


def test_version_1_of_the_package_refuses_a_window(monkeypatch):
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface.flash_attn_unpadded_func = _version_1
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(attention, "unavailable_reason", lambda name, device: None)
    with pytest.raises(NotImplementedError, match='"flash_attn" does not support window'):
        with_hooks(tiny_models.build("llama"), attention={"implementation": "flash_attn", "sliding_window": 4})

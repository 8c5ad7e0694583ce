# SPDX-License-Identifier: Apache-2.0
"""Models of transformers in tiles train like whole ones, and never form all logits or a whole feed-forward layer."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import tiny_models
from tests.unit.hooks import apply

LANGUAGE = ["gpt_neox", "gpt2", "llama", "esm"]
WIDTH = {"gpt_neox": 32, "gpt2": 64, "llama": 32, "esm": 32}
BOTH = {"mlp": 3, "loss": 5}


def padded(name):
    return tiny_models.with_padding(tiny_models.batch(name, 2, 16, 0), [16, 11])


@pytest.mark.parametrize("block", [{"mlp": 3}, {"loss": 5}, BOTH, {"mlp": 16, "loss": 32}], ids=str)
@pytest.mark.parametrize("name", LANGUAGE)
def test_trains_like_the_plain_model(name, block):
    model, batch = tiny_models.build(name), padded(name)
    tiled, (line,), _ = apply.with_hooks(model, tiling=block)
    parts = {
        "mlp": f"2 feed-forward layers take {block.get('mlp')} tokens of each sequence at a time",
        "loss": f"the output layer and the loss take {block.get('loss')} tokens at a time",
    }
    assert line == "; ".join(parts[part] for part in block)
    apply.assert_trains_like(tiled, batch, model, batch)
    apply.assert_trains_like(copy.deepcopy(tiled), batch, model, batch)


@pytest.mark.parametrize("kind", ["full", "selective", "keep_attention"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_goes_with_recomputed_layers(name, kind):
    model, batch = tiny_models.build(name), padded(name)
    tiled, *_ = apply.with_hooks(model, tiling=BOTH, activation_checkpointing={"kind": kind})
    apply.assert_trains_like(tiled, batch, model, batch)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LANGUAGE)
def test_goes_with_the_recomputation_of_transformers(name, reentrant):
    model, batch = tiny_models.build(name), padded(name)
    tiled, *_ = apply.with_hooks(model, tiling=BOTH)
    tiled.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tiled.enable_input_require_grads()  # without, reentrant checkpoints have no gradient at all
    apply.assert_trains_like(tiled, batch, model, batch)


@pytest.mark.parametrize("features", [{}, {"activation_checkpointing": {"kind": "full"}}], ids=["", "recomputed"])
def test_dropout_masks_are_the_same_in_both_passes(features):
    """The gradient is that of the loss with the masks of the forward pass: a difference quotient."""
    model = tiny_models.build("gpt2").double()
    for block in model.transformer.h:
        block.mlp.dropout.p = 0.5
    model, *_ = apply.with_hooks(model, tiling=BOTH, **features)
    batch, weight = padded("gpt2"), model.transformer.h[0].mlp.c_fc.weight

    def loss():
        torch.manual_seed(5)
        return model(**batch).loss

    direction = torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        losses = []
        for step in (1e-5, -1e-5):
            weight += step * direction
            losses.append(loss())
            weight -= step * direction
    torch.testing.assert_close((gradient * direction).sum(), (losses[0] - losses[1]) / 2e-5, rtol=1e-6, atol=1e-9)


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor with `width` channels that is made."""

    def __init__(self, width):
        super().__init__()
        self.width, self.elements = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and self.width in tensor.shape:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("part", ["mlp", "loss"])
def test_no_tensor_of_all_tokens_exists(name, part):
    model, batch = tiny_models.build(name), tiny_models.batch(name, 2, 60, 0)
    width = {"mlp": WIDTH[name], "loss": tiny_models.VOCAB}[part]
    tiled, *_ = apply.with_hooks(model, tiling={part: 4}, activation_checkpointing={"kind": "full"})
    largest = {}
    for which, run in (("plain", model), ("tiled", tiled)):
        with _Largest(width) as watch:
            run(**batch).loss.backward()
        largest[which] = watch.elements
    weight, tile = width * tiny_models.HIDDEN, width * 2 * 4
    assert largest["plain"] >= width * 2 * 60
    assert largest["tiled"] <= max(weight, tile)


@pytest.mark.parametrize("name", LANGUAGE)
def test_outputs_have_logits_where_no_loss_is_asked_for(name):
    model, batch = tiny_models.build(name), padded(name)
    tiled, *_ = apply.with_hooks(model, tiling=BOTH)
    output = tiled(**batch, output_hidden_states=True)
    assert output.logits is None and output[0] is output.loss and len(output.hidden_states) == tiny_models.LAYERS + 1
    with torch.no_grad():
        torch.testing.assert_close(tiled(**batch).loss, model(**batch).loss)
    del batch["labels"]
    with torch.no_grad():
        torch.testing.assert_close(tiled.eval()(**batch).logits, model.eval()(**batch).logits)


def test_labels_that_are_shifted_and_settings_of_the_loss_mean_what_they_meant():
    model = tiny_models.build("llama")
    tiled, *_ = apply.with_hooks(model, tiling=BOTH)
    batch = tiny_models.batch("llama", 2, 16, 0)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    expected = model(**batch).loss
    torch.testing.assert_close(tiled(input_ids=batch["input_ids"], shift_labels=shifted).loss, expected)
    torch.testing.assert_close(tiled(batch["input_ids"], labels=batch["labels"], shift_labels=shifted).loss, expected)
    batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 7)
    settings = {"ignore_index": 7, "num_items_in_batch": torch.tensor(50)}
    torch.testing.assert_close(tiled(**batch, **settings).loss, model(**batch, **settings).loss)


def test_a_batch_without_any_label_costs_nothing():
    tiled, *_ = apply.with_hooks(tiny_models.build("gpt_neox"), tiling=BOTH)
    batch = tiny_models.batch("gpt_neox", 1, 16, 0)
    loss = tiled(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in tiled.parameters())


def test_a_failed_batch_leaves_no_labels_behind():
    tiled, *_ = apply.with_hooks(tiny_models.build("gpt2"), tiling=BOTH)
    batch = tiny_models.batch("gpt2", 1, 16, 0)
    with pytest.raises(ValueError, match=r"labels must be \[1, 16\] like hidden, got \[1, 15\]"):
        tiled(batch["input_ids"], labels=batch["labels"][:, 1:])
    assert tiled.lm_head(torch.zeros(1, 16, tiny_models.HIDDEN)).shape == (1, 16, tiny_models.VOCAB)


@pytest.mark.parametrize("name", ["llama", "genslm-rotary"])
def test_a_later_engine_has_its_own_tiles(name):
    model, batch = tiny_models.build(name), tiny_models.batch(name, 2, 16, 0)
    first, *_ = apply.with_hooks(model, tiling={"loss": 5})
    second, *_ = apply.with_hooks(first, tiling={"mlp": 5})
    assert first(**batch).logits is None and second(**batch).logits is not None
    apply.assert_trains_like(second, batch, model, batch)
    without, *_ = apply.with_hooks(first, attention={"implementation": "tiled"})
    assert without(**batch).logits is not None


def test_images_have_tiles_of_their_feed_forward_layers():
    model, batch = tiny_models.build("vit"), tiny_models.batch("vit", 3, 0, 0)
    tiled, lines, _ = apply.with_hooks(model, tiling={"mlp": 4})
    assert lines == ["2 feed-forward layers take 4 tokens of each sequence at a time"]
    apply.assert_trains_like(tiled, batch, model, batch)


@pytest.mark.parametrize("name", [*LANGUAGE, "vit"])
def test_refuses_to_tile_the_loss_of_a_model_without_one(name):
    model = tiny_models.build(name)
    model = model if name == "vit" else model.base_model
    with pytest.raises(NotImplementedError, match=f"logits and a loss of every token, got {type(model).__name__}"):
        apply.with_hooks(model, tiling={"loss": 4})


def test_refuses_a_loss_that_it_would_replace():
    model = tiny_models.build("llama")
    model.loss_function = lambda **_: 0.0
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM has a loss function of its own: <function"):
        apply.with_hooks(model, tiling={"loss": 4})


def test_refuses_a_loss_that_is_set_later():
    tiled, *_ = apply.with_hooks(tiny_models.build("llama"), tiling={"loss": 4})
    tiled.loss_function = lambda **_: 0.0
    batch = tiny_models.batch("llama", 1, 16, 0)
    with pytest.raises(NotImplementedError, match="ds4sci.tiling.loss .* has a loss function of its own"):
        tiled(**batch)
    batch.pop("labels")
    assert tiled(**batch).logits.shape[:2] == (1, 16)


def test_refuses_outputs_without_names():
    tiled, *_ = apply.with_hooks(tiny_models.build("llama"), tiling={"loss": 4})
    with pytest.raises(NotImplementedError, match="return_dict=False is not supported with ds4sci.tiling.loss"):
        tiled(**tiny_models.batch("llama", 1, 16, 0), return_dict=False)

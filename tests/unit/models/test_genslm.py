# SPDX-License-Identifier: Apache-2.0
"""The decoder on one rank: against Hugging Face's models of the same families, and its own promises."""

import pytest
import torch
import torch.nn.functional as F

from deepspeed_ds4sci.models import GenSLM, GenSLMConfig, shift_labels
from deepspeed_ds4sci.sequence.position_table import ShardedPositionEmbedding
from deepspeed_ds4sci.sequence.rotary import RotaryScaling

TINY = dict(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=40, max_positions=64)
KINDS = {
    "rotary": dict(rotary_fraction=0.5),
    "learned": dict(
        position_embedding="learned", parallel_residual=False, activation="gelu_tanh", tie_embeddings=True
    ),
    "alibi": dict(position_embedding="alibi", num_kv_heads=2),
}


def make_model(kind="rotary", **overrides):
    torch.manual_seed(0)
    model = GenSLM(GenSLMConfig(**{**TINY, **KINDS[kind], **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():  # nothing hidden behind a bias of zero
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens(batch=2, length=20):
    return torch.randint(5, 69, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_sees_the_past_alone(kind):
    model, ids = make_model(kind).eval(), tokens(1)
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] - 4) % 60 + 5
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).any(-1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_positions_matter(kind):
    model, ids = make_model(kind).eval(), tokens(1)
    swapped = ids[:, [1, 0, *range(2, 20)]]
    assert not torch.allclose(model(ids).logits[:, -1], model(swapped).logits[:, -1], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_or_right_changes_nothing(kind):
    model, ids = make_model(kind).eval(), tokens(1, 12)
    padded = F.pad(ids, (0, 4), value=3)
    mask = torch.ones_like(padded)
    mask[:, 12:] = 0
    labelled, plain = model(padded, labels=padded, attention_mask=mask), model(ids, labels=ids)
    torch.testing.assert_close(labelled.logits[:, :12], plain.logits)
    torch.testing.assert_close(labelled.loss, plain.loss)
    assert labelled.num_tokens == 11
    left = F.pad(ids, (4, 0), value=3)
    positions = (torch.arange(16) - 4).clamp(min=0)[None]
    shifted = model(left, attention_mask=mask.flip(1), position_ids=positions)
    torch.testing.assert_close(shifted.logits[:, 4:], plain.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind):
    model, ids = make_model(kind).eval(), tokens(1, 20)
    documents = (torch.arange(20) >= 8).long()[None]
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    together = model(ids, labels=ids, document_ids=documents, position_ids=positions)
    first, second = model(ids[:, :8], labels=ids[:, :8]), model(ids[:, 8:], labels=ids[:, 8:])
    torch.testing.assert_close(together.logits, torch.cat([first.logits, second.logits], 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.loss_sum, first.loss_sum + second.loss_sum)
    assert together.num_tokens == first.num_tokens + second.num_tokens == 18


def test_a_custom_mask_and_a_window_reach_the_attention():
    model, ids = make_model().eval(), tokens(1)
    window = model(ids, attention_mask=lambda b, h, i, j: i - j < 3).logits
    torch.testing.assert_close(window, make_model(window=3).eval()(ids).logits)
    assert not torch.allclose(window, model(ids).logits, atol=1e-3)


def test_an_encoder_sees_the_future_and_keeps_its_labels():
    model, ids = make_model(causal=False).eval(), tokens(1)
    labels = ids.masked_fill(torch.arange(20) % 3 > 0, -100)
    changed = ids.clone()
    changed[0, -1] = 70 - ids[0, -1] if ids[0, -1] != 35 else 6
    assert not torch.equal(model(ids).logits[0, 0], model(changed).logits[0, 0])
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[0], labels[0])
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_change_nothing(kind):
    model, ids = make_model(kind), tokens()
    labels = ids.masked_fill(ids % 5 == 0, -100)
    expected = model(ids, labels=labels)
    want = torch.autograd.grad(expected.loss, list(model.parameters()))
    model.mlp_tile, model.loss_tile = 7, 9
    output = model(ids, labels=labels)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected.loss)
    for gradient, other in zip(torch.autograd.grad(output.loss, list(model.parameters())), want, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_labels_may_be_shifted_before():
    model, ids = make_model(), tokens()
    assert torch.equal(model(ids, labels=ids).loss, model(ids, shift_labels=shift_labels(ids)).loss)
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)
    nothing = model(ids, labels=torch.full_like(ids, -100))
    assert nothing.loss == 0 and nothing.num_tokens == 0


def test_shifting_stops_at_documents_and_padding():
    labels = torch.arange(8)[None] + 10
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1]])
    assert shift_labels(labels).tolist() == [[11, 12, 13, 14, 15, 16, 17, -100]]
    assert shift_labels(labels, documents).tolist() == [[11, 12, -100, 14, -100, -100, -100, -100]]


def test_initial_weights_repeat_with_the_seed_and_do_not_depend_on_meta():
    torch.manual_seed(3)
    one = GenSLM(GenSLMConfig(**TINY, **KINDS["learned"]))
    with torch.device("meta"):
        other = GenSLM(GenSLMConfig(**TINY, **KINDS["learned"]))
    other.to_empty(device="cpu").initialize_weights()
    assert other.head.weight is other.token_embedding.weight
    for name, parameter in one.named_parameters():
        if parameter.dim() == 2:
            scale = 0.02 / 2 if "attention_output" in name or "mlp.2" in name else 0.02
            assert abs(parameter.std() / scale - 1) < 0.2, name
    assert not any(parameter.isnan().any() for parameter in other.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_the_meta_device_works(kind):
    scaling = dict(rotary_scaling=RotaryScaling("yarn", 2.0, 64)) if kind == "rotary" else {}
    model = make_model(kind, **scaling).eval()
    with torch.device("meta"):
        other = GenSLM(model.config)
    other.to_empty(device="cpu").initialize_weights()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(tokens()).logits, model(tokens()).logits)


def test_a_sharded_table_can_take_the_tables_place():
    model, ids = make_model("learned").eval(), tokens()
    expected = model(ids).logits
    model.position_embedding = ShardedPositionEmbedding.from_table(model.position_embedding.weight, None)
    assert torch.equal(model(ids).logits, expected)


def test_dropout_repeats_under_recomputation():
    from torch.utils.checkpoint import checkpoint

    model, ids = make_model(hidden_dropout=0.2, attention_dropout=0.2, embedding_dropout=0.1), tokens()
    gradients = []
    for recompute in (False, True):
        if recompute:
            for layer in model.layers:
                plain = layer.forward
                layer.forward = lambda x, context, plain=plain: checkpoint(plain, x, context, use_reentrant=False)
        torch.manual_seed(8)
        loss = model(ids, labels=ids).loss
        gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_bf16(kind):
    model, ids = make_model(kind), tokens()
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ids, labels=ids).loss, expected, rtol=0.02, atol=0.02)
    output = model.bfloat16()(ids, labels=ids)
    assert output.hidden_states.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.03, atol=0.03)


def test_longer_than_trained_on():
    ids = tokens(1, 100)
    for kind in ("rotary", "alibi"):
        assert make_model(kind).eval()(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match="at most 64 tokens, the rows of the learned position table, got 100"):
        make_model("learned")(ids)


def test_bad_inputs_are_named():
    model, ids = make_model(), tokens()
    with pytest.raises(ValueError, match="labels and shift_labels were both given"):
        model(ids, labels=ids, shift_labels=ids)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, L\] = \[2, 20\] .* got \[2, 19\]"):
        model(ids, attention_mask=torch.ones(2, 19))
    with pytest.raises(ValueError, match=r"document_ids must be .* beside a padding mask, got \[1, 20\]"):
        model(ids, attention_mask=torch.ones(2, 20), document_ids=torch.zeros(1, 20))
    with pytest.raises(AttributeError, match="logit"):
        _ = model(ids).logit

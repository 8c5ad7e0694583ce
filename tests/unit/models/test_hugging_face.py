# SPDX-License-Identifier: Apache-2.0
"""The decoder computes what Hugging Face's models of the same families compute, and trades weights with them."""

import pytest
import torch

from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.models.hugging_face import architecture, from_hugging_face, to_hugging_face
from tests.unit.models.test_genslm import KINDS, TINY, tokens

transformers = pytest.importorskip("transformers")


def randomised(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def gpt_neox(parallel_residual=True):
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=69, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            max_position_embeddings=64, use_parallel_residual=parallel_residual, hidden_act="gelu",
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
            attn_implementation="eager",
        )
    )  # fmt: skip


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=69, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=40, attn_implementation="eager",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


FAMILIES = {
    "gpt-neox": (gpt_neox, KINDS["rotary"]),
    "gpt-neox-sequential": (lambda: gpt_neox(False), dict(**KINDS["rotary"], parallel_residual=False)),
    "gpt2": (gpt2, KINDS["learned"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_give_the_same_outputs(family):
    build, kind = FAMILIES[family]
    theirs, config = randomised(build()), GenSLMConfig(**TINY, **kind)
    assert architecture(config) == type(theirs).__name__
    ours, ids = GenSLM(config).eval(), tokens()
    ours.load_state_dict(from_hugging_face(theirs.state_dict(), config))
    actual, expected = ours(ids, labels=ids), theirs(ids, labels=ids)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_go_there_and_back(family):
    build, kind = FAMILIES[family]
    config = GenSLMConfig(**TINY, **kind)
    ours, theirs = randomised(GenSLM(config)), build().eval()
    exported = to_hugging_face(ours.state_dict(), config)
    assert set(exported) == set(theirs.state_dict())
    theirs.load_state_dict(exported)
    ids = tokens()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
    back = from_hugging_face(exported, config)
    assert all(torch.equal(tensor, back[name]) for name, tensor in ours.state_dict().items())


def test_the_older_name_of_the_head_is_known():
    config = GenSLMConfig(**TINY, **KINDS["rotary"])
    exported = to_hugging_face(GenSLM(config).state_dict(), config)
    head = exported["embed_out.weight"] = exported.pop("lm_head.weight")
    assert torch.equal(from_hugging_face(exported, config)["head.weight"], head)
    del exported["embed_out.weight"]
    with pytest.raises(ValueError, match="the state dict has no tensor 'lm_head.weight'"):
        from_hugging_face(exported, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(position_embedding="alibi"), "no Hugging Face model of these families has alibi positions"),
        (dict(rotary_fraction=0.5, num_kv_heads=2), "GPTNeoXForCausalLM needs key_value_heads = 4, got 2"),
        (dict(rotary_fraction=0.5, window=4), "GPTNeoXForCausalLM needs window = None, got 4"),
        (dict(position_embedding="learned"), "GPT2LMHeadModel needs parallel_residual = False, got True"),
        (dict(rotary_fraction=0.7), "rotary_fraction of the head dim 8 is odd"),
    ],
)
def test_what_has_no_counterpart_is_refused(fields, message):
    with pytest.raises(NotImplementedError, match=message):
        architecture(GenSLMConfig(**{**TINY, **fields}))

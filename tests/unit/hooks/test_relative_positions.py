# SPDX-License-Identifier: Apache-2.0
"""Positions in place of a model's own, on one rank: the same training as a model that was built with them."""

import math
from types import SimpleNamespace

import pytest
import torch

from deepspeed_ds4sci.config import read_block
from deepspeed_ds4sci.hooks.context import HookContext
from deepspeed_ds4sci.hooks.relative_positions import replace_positions
from deepspeed_ds4sci.hooks.removal import detach
from tests.distributed import oracle, tiny_models
from tests.unit.hooks.apply import assert_trains_like, differs, with_hooks

CASES = [
    *((name, {"kind": "alibi"}) for name in ("gpt2", "llama", "gpt_neox", "esm", "genslm-learned", "genslm-rotary")),
    *((name, {"kind": "rotary"}) for name in ("gpt2", "genslm-learned", "genslm-alibi")),
    ("llama", {"scaling": {"kind": "linear", "factor": 4.0}}),
    ("llama", {"kind": "rotary", "scaling": {"kind": "yarn", "factor": 4.0, "original_length": 8}}),
    ("esm", {"scaling": {"kind": "ntk", "factor": 2.0}}),
    ("genslm-rotary", {"scaling": {"kind": "yarn", "factor": 2.0}}),
    ("genslm-learned", {"kind": "rotary", "scaling": {"kind": "linear", "factor": 2.0}}),
]


@pytest.mark.parametrize("name, block", CASES, ids=str)
def test_trains_like_a_model_that_was_built_so(name, block):
    model = tiny_models.build(name)
    ours, lines, _ = with_hooks(model, position_embedding=block)
    case = SimpleNamespace(model=name, features={"position_embedding": block})
    reference = oracle.reference_model(case, model)
    batch = tiny_models.batch(name, 2, 16, 0)

    def run(**batch):
        return oracle.run(case, reference, batch, dict)

    run.zero_grad, run.named_parameters = reference.zero_grad, reference.named_parameters
    assert_trains_like(ours, batch, run, batch)
    assert differs(ours, batch, model, batch)
    assert f"has {block.get('kind', 'rotary')} positions" in lines[0]


def test_a_replaced_table_is_no_part_of_the_model_and_limits_no_length():
    model = tiny_models.build("gpt2")
    table = model.transformer.wpe.weight
    parameters = list(model.parameters())
    context = HookContext(
        config=read_block({"ds4sci": {"position_embedding": {"kind": "alibi"}}}),
        model_parameters=parameters,
    )
    replace_positions(model, context)
    assert all(p is not table for p in [*context.model_parameters, *model.parameters()])
    assert len(context.model_parameters) == len(parameters) - 1
    assert model(**tiny_models.batch("gpt2", 1, 4 * tiny_models.POSITIONS, 0)).loss.isfinite()


def test_angles_are_exact_beyond_a_million_positions():
    """transformers forms them in fp32, which is off by more than 0.01 rad there."""
    model = tiny_models.build("llama")
    ours, *_ = with_hooks(model, position_embedding={"scaling": {"kind": "linear", "factor": 2.0}})
    position = 3_000_001
    cos, sin = ours.model.rotary_emb(torch.zeros(1, 1, 16), torch.tensor([[position]]))
    expected = [position / 2 * 10000.0 ** -(pair / 2) for pair in (0, 1, 0, 1)]
    assert torch.allclose(cos[0, 0], torch.tensor([math.cos(angle) for angle in expected]), atol=1e-6)
    assert torch.allclose(sin[0, 0], torch.tensor([math.sin(angle) for angle in expected]), atol=1e-6)


def yarn_llama():
    model = tiny_models.build("llama")
    model.config.rope_parameters["rope_type"] = "yarn"
    return model


def test_another_engine_is_refused_once_a_learned_table_is_gone():
    model = tiny_models.build("gpt2")
    block = {"position_embedding": {"kind": "alibi"}}
    context = HookContext(config=read_block({"ds4sci": block}))
    replace_positions(model, context)
    with pytest.raises(
        NotImplementedError,
        match="the learned positions of GPT2LMHeadModel were replaced for an earlier engine, which cannot be undone; "
        "make a new model for a new engine",
    ):
        detach(model)


@pytest.mark.parametrize(
    "build, features, error, message",
    [
        ("llama", {"kind": "rotary"}, ValueError, 'kind = "rotary" changes nothing: LlamaForCausalLM has them'),
        ("genslm-alibi", {"kind": "alibi"}, ValueError, 'kind = "alibi" changes nothing: GenSLM has them'),
        ("gpt2", {"scaling": {"kind": "ntk", "factor": 2.0}}, ValueError, "GPT2LMHeadModel has learned"),
        (
            yarn_llama,
            {"scaling": {"kind": "ntk", "factor": 2.0}},
            NotImplementedError,
            "built with rotary scaling 'yarn'",
        ),
        (lambda: torch.nn.Linear(2, 2), {"kind": "alibi"}, NotImplementedError, "sequences of Linear cannot be split"),
    ],
)
def test_refuses_what_changes_nothing_or_cannot_be(build, features, error, message):
    model = tiny_models.build(build) if isinstance(build, str) else build()
    with pytest.raises(error, match=message):
        with_hooks(model, position_embedding=features)


def test_refuses_attention_that_takes_no_biases():
    with pytest.raises(NotImplementedError, match='"flash" does not support alibi; "tiled" does'):
        with_hooks(
            tiny_models.build("gpt2"), position_embedding={"kind": "alibi"}, attention={"implementation": "flash"}
        )

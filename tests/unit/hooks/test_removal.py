# SPDX-License-Identifier: Apache-2.0
"""Another engine on a model starts from the model as it was."""

import pytest
import torch

from deepspeed_ds4sci.hooks.removal import detach, remove_all, replace_attribute
from tests.distributed import tiny_models
from tests.unit.hooks import apply
from tests.unit.hooks.apply import traces

EVERYTHING = {
    "attention": {"implementation": "tiled", "sliding_window": 3},
    "attention_mask": {"kind": "custom", "rule": "tests.helpers.mask_rules:near_or_global"},
    "activation_checkpointing": {"kind": "keep_attention"},
    "tiling": {"mlp": 3, "loss": 5},
}
CASES = [
    *((name, EVERYTHING) for name in ("llama", "gpt2", "gpt_neox", "esm", "genslm-rotary")),
    ("llama", {"position_embedding": {"kind": "alibi"}}),
    ("llama", {"position_embedding": {"scaling": {"kind": "linear", "factor": 2.0}}}),
    ("genslm-alibi", {"position_embedding": {"kind": "rotary"}}),
    ("gpt2", {"activation_checkpointing": {"kind": "selective", "every_n_layers": 2}}),
    ("genslm-alibi", {"activation_checkpointing": {"kind": "selective"}}),
    ("vit", {"attention": {"implementation": "tiled"}, "tiling": {"mlp": 3}}),
]


@pytest.mark.parametrize("name, features", CASES, ids=str)
def test_a_model_without_its_hooks_is_the_plain_model(name, features):
    model, batch = tiny_models.build(name), tiny_models.batch(name, 2, 16, 0)
    hooked, *_ = apply.with_hooks(model, **features)
    assert traces(hooked) != traces(model)
    detach(hooked)
    assert traces(hooked) == traces(model)
    (loss, gradients), (expected_loss, expected) = apply.train(hooked, batch), apply.train(model, batch)
    assert loss == expected_loss and gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_the_hooks_of_a_part_are_found():
    model = tiny_models.build("llama")
    hooked, *_ = apply.with_hooks(model, activation_checkpointing={"kind": "full"})
    detach(torch.nn.ModuleDict({"student": hooked}))
    assert traces(hooked) == traces(model)


def test_changes_of_one_attribute_are_undone_latest_first():
    linear = torch.nn.Linear(2, 2)
    handles = [replace_attribute(linear, "forward", len), replace_attribute(linear, "forward", sum)]
    handles += [replace_attribute(linear, "bias", None), replace_attribute(linear, "in_features", 3)]
    assert linear.forward is sum and linear.bias is None
    remove_all(handles)
    assert "forward" not in vars(linear) and linear.in_features == 2 and handles == []
    assert isinstance(linear.bias, torch.nn.Parameter)

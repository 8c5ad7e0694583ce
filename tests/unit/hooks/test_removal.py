# SPDX-License-Identifier: Apache-2.0
"""Another engine on a model starts from the model as it was; a copy of the model has hooks of its own."""

import copy

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

OFFLOADED = {"activation_checkpointing": {"kind": "full", "cpu_offload": True}}


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


@pytest.mark.parametrize("name, features", [*CASES, ("llama", OFFLOADED)], ids=str)
def test_a_copy_runs_and_recomputes_its_own_layers(name, features):
    model, batch = tiny_models.build(name), tiny_models.batch(name, 2, 16, 0)
    hooked, *_ = apply.with_hooks(model, **features)
    loss, expected = apply.train(hooked, batch)  # the copy is made between two steps
    copied = copy.deepcopy(hooked)
    with torch.no_grad():
        for parameter in hooked.parameters():
            parameter.zero_()
    hooked.zero_grad(set_to_none=True)
    copied_loss, gradients = apply.train(copied, batch)
    assert copied_loss == loss and gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert all(parameter.grad is None for parameter in hooked.parameters())
    left = traces(hooked)
    detach(copied)
    assert traces(copied) == traces(model) and traces(hooked) == left
    apply.assert_trains_like(copied, batch, model, batch)


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

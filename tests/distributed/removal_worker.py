# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_engine_behaviour.py run around a model's hooks: later engines on it, and copies of it."""

import copy

import torch
import torch.distributed as dist

from tests.distributed import tiny_models
from tests.distributed.behaviour_worker import engine_of, message_of
from tests.distributed.engine_worker import Case, relative_error, scale_of
from tests.unit.hooks.apply import traces


def later_engines():
    """A second engine without a block, a first one that a later hook refuses, and engines after a sharded table."""
    found = {}
    features = {
        "attention": {"implementation": "tiled", "sliding_window": 3},
        "activation_checkpointing": {"kind": "full"},
        "tiling": {"mlp": 4, "loss": 4},
    }
    plain = {**Case("llama").ds_config(dist.get_world_size()), "ds4sci": {}}
    for name in ("llama", "genslm-rotary", "esm", "vit"):
        own = features if name != "vit" else {**features, "tiling": {"mlp": 4}}
        model = tiny_models.build(name)
        batch, before = tiny_models.batch(name, 2, 16, 0), traces(model)
        expected = model(**batch).loss.item()
        first, *_ = engine_of(case=Case(name, mode="ring", features=own), model=model)
        changed = first(**batch).loss.item() != expected and traces(model) != before
        second, *_ = engine_of(model=model, config=plain)
        found[name] = changed, traces(model) == before, second(**batch).loss.item() == expected
        found["first engine"] = message_of(first, **batch)
    esm = tiny_models.build("esm")
    before = traces(esm)
    case = Case("esm", features={"attention_mask": {"kind": "causal"}})
    found["refused by a later hook"] = message_of(engine_of, case=case, model=esm)
    found["unchanged then"] = traces(esm) == before
    model = engine_of(case=Case("gpt2", sharded_table=True))[0].module
    found["after a table"] = message_of(engine_of, model=model, config=plain)
    return found


def copies():
    """Errors of the loss and of the gradients of a copy whose original is gone, for models that share sequences; and
    what copying a model with a sharded table says."""
    found, features = {}, {"activation_checkpointing": {"kind": "full"}, "tiling": {"mlp": 4}}
    for name in ("llama", "genslm-rotary", "esm", "vit"):
        model = tiny_models.build(name)
        reference, batch = copy.deepcopy(model), tiny_models.batch(name, 2, 16, 0)
        reference(**batch).loss.backward()
        expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
        engine, *_ = engine_of(case=Case(name, mode="ring", features=features), model=model)
        engine(**tiny_models.batch(name, 1, 12, 1))
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loss = copied(**batch).loss
        loss.backward()
        worst = abs(loss.item() - reference(**batch).loss.item())
        for each, parameter in copied.named_parameters():
            if expected[each] is None:
                continue
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()  # as an engine does
            worst = max(worst, relative_error(parameter.grad, expected[each], scale_of(each, expected)))
        found[name] = worst
    model = engine_of(case=Case("gpt2", sharded_table=True))[0].module
    return found, message_of(copy.deepcopy, model)

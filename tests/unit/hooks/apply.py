# SPDX-License-Identifier: Apache-2.0
"""A block's hooks on a model without an engine, where one rank has whole sequences."""

import copy

import torch

from deepspeed_ds4sci.config import check_combinations, read_block
from deepspeed_ds4sci.hooks import HOOKS
from deepspeed_ds4sci.hooks.context import HookContext
from deepspeed_ds4sci.hooks.removal import detach
from tests.distributed.engine_worker import relative_error, scale_of

LIMIT = 2e-6  # of the tensor's largest value


def with_hooks(model, **features):
    """(a copy of the model under the hooks of a `ds4sci` block, what they said, their context)."""
    model = copy.deepcopy(model)
    detach(model)
    ds_config = {"ds4sci": features}
    config = read_block(ds_config)
    check_combinations(config, ds_config)
    context = HookContext(config=config)
    model.ds4sci_handles = context.handles
    changes = [hook.before_engine(model, context) for hook in HOOKS if getattr(config, hook.name).enabled()]
    assert all(change.count for change in changes)
    return model, [change.text for change in changes], context


def train(model, batch):
    """The loss, and every gradient by name."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_trains_like(model, batch, reference, reference_batch):
    loss, gradients = train(model, batch)
    expected_loss, expected = train(reference, reference_batch)
    assert abs(loss - expected_loss) <= LIMIT * abs(expected_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = relative_error(gradient, expected[name], scale_of(name, expected))
        assert error <= LIMIT, f"{name}: {error:.2e} of the largest value"


def traces(model):
    """What hooks may leave in a model: attributes and hooks by module, and the settings that they replace."""
    modules = {
        name: (
            {key for key in vars(module) | module._modules if key != "ds4sci_handles"},
            sum(map(_is_ours, [*module._forward_pre_hooks.values(), *module._forward_hooks.values()])),
            [type(child) for child in module.children()],
        )
        for name, module in model.named_modules()
    }
    of_config = ("_attn_implementation", "window", "position_embedding", "rotary_scaling")
    settings = {name: getattr(model.config, name, None) for name in of_config}
    settings |= {name: getattr(model, name, None) for name in ("mlp_tile", "loss_tile", "loss_reduction")}
    return modules, settings, type(getattr(model, "attention", None))


def _is_ours(hook):
    """DeepSpeed's engines leave hooks too."""
    return getattr(hook, "func", hook).__module__.startswith("deepspeed_ds4sci")


def differs(model, batch, other, other_batch):
    """Whether two models give different logits."""
    with torch.no_grad():
        ours, theirs = (
            run(**{name: value for name, value in given.items() if name != "labels"}).logits
            for run, given in ((model, batch), (other, other_batch))
        )
    return (ours - theirs).abs().max() > 1e-3

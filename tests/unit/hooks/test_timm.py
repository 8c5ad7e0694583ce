# SPDX-License-Identifier: Apache-2.0
"""timm's vision transformer on one rank: its attention is replaced, its layers recomputed and tiled, without edits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import tiny_models
from tests.helpers import timm_models
from tests.unit.hooks.apply import LIMIT, with_hooks

pytestmark = pytest.mark.skipif(not timm_models.INSTALLED, reason=timm_models.REASON)


def train(model):
    batch = tiny_models.batch("timm", 3, 0, 0)
    model.zero_grad()
    loss = F.cross_entropy(model(batch["pixel_values"]), batch["labels"])
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_trains_like(model, reference):
    ours, theirs = train(model), train(reference)
    for name, expected in theirs.items():
        # A key bias adds the same to all scores of a query: what its gradient should be is 0.
        error = (ours[name] - expected).abs().max() / expected.abs().max()
        assert error <= LIMIT, f"{name}: {error:.2e} of the largest value"


def test_refuses_the_recomputation_of_timm():
    model = tiny_models.build("timm")
    model.set_grad_checkpointing()
    with pytest.raises(NotImplementedError, match="recomputation that VisionTransformer has of its own"):
        with_hooks(model, attention={"implementation": "tiled"})


@pytest.mark.parametrize("kind", [None, "full", "selective", "keep_attention"])
def test_trains_like_timm_alone(kind):
    model = tiny_models.build("timm")
    recomputed = {"activation_checkpointing": {"kind": kind}} if kind else {}
    ours, lines, _ = with_hooks(model, attention={"implementation": "tiled"}, tiling={"mlp": 3}, **recomputed)
    assert lines[0] == "2 Attention modules attend by 'tiled'"
    assert_trains_like(ours, model)


class _Names(TorchDispatchMode):
    """The operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_its_own_attention_is_not_asked_any_more():
    model = tiny_models.build("timm")
    ours, *_ = with_hooks(model, attention={"implementation": "tiled"})
    for run, fused in ((model, True), (ours, False)):
        with _Names() as ran:
            train(run)
        assert any("scaled_dot_product" in name for name in ran.names) == fused
    with pytest.raises(NotImplementedError, match="attn_mask and is_causal of timm's models do not go with"):
        ours(torch.zeros(1, 3, 12, 12), is_causal=True)


def test_refuses_attention_that_is_not_asked_for_by_name():
    model = tiny_models.build("timm")
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(NotImplementedError, match="timm's attention without torch's fused attention cannot be"):
        with_hooks(model, attention={"implementation": "tiled"})


def test_refuses_another_model_of_that_name():
    class VisionTransformer(nn.Module):
        pass

    with pytest.raises(NotImplementedError, match="VisionTransformer of .*test_timm is not timm's"):
        with_hooks(VisionTransformer(), attention={"implementation": "tiled"})

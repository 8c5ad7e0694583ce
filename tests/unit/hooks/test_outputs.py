# SPDX-License-Identifier: Apache-2.0
"""What a script gets of a forward pass on a part of the sequence."""

from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from deepspeed_ds4sci.hooks.families import family_of
from tests.distributed import tiny_models


@pytest.mark.parametrize("kind", [tuple, list])
def test_hidden_states_of_every_layer_are_whole(kind):
    model = tiny_models.build("llama")
    state = SimpleNamespace(batch=SimpleNamespace(labels=None), gather=lambda part: torch.cat([part, part], 1))
    parts = kind(torch.full((1, 4, 8), float(layer)) for layer in range(3))
    output = CausalLMOutputWithPast(logits=torch.zeros(1, 4, 16), hidden_states=parts)
    whole = family_of(model).finish(model, state, output)
    assert type(whole.hidden_states) is kind and whole.logits.shape == (1, 8, 16)
    assert [(each.shape, each[0, 0, 0].item()) for each in whole.hidden_states] == [((1, 8, 8), i) for i in range(3)]

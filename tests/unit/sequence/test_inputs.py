# SPDX-License-Identifier: Apache-2.0
"""Where batches are compared over ranks: on the device of the tokens, wherever a mask waits."""

import pytest
import torch
import torch.distributed as dist

from deepspeed_ds4sci.hooks.families import FAMILIES
from deepspeed_ds4sci.sequence.inputs import all_batches, batch_device, same_batch


def batch_with_cpu_mask(name, device):
    """A batch whose mask comes first, as in the signatures of transformers when a batch has inputs_embeds."""
    return {"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool), name: torch.zeros(1, 4, 8, device=device)}


@pytest.mark.parametrize("name", sorted({name for family in FAMILIES for name in family.inputs}))
def test_a_batch_is_where_its_tokens_or_images_are(name):
    assert batch_device(batch_with_cpu_mask(name, "meta")).type == "meta"


def test_ranks_compare_batches_on_the_device_of_the_tokens(monkeypatch):
    class Reached(Exception):
        pass

    def all_gather(everyone, digest, group):
        raise Reached(digest.device.type)

    monkeypatch.setattr(dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    with pytest.raises(Reached, match="meta"):
        same_batch(batch_with_cpu_mask("inputs_embeds", "meta"), None, 1)


def test_batches_of_other_ranks_come_to_where_this_ranks_tensors_are(monkeypatch):
    theirs = {**batch_with_cpu_mask("inputs_embeds", "cpu"), "labels": torch.zeros(1, 4)}
    mine = batch_with_cpu_mask("inputs_embeds", "meta")
    mine["inputs_embeds"].cpu = lambda: theirs["inputs_embeds"]  # a meta tensor has no values to send

    def all_gather_object(everyone, sent, group):
        everyone[:] = [sent, theirs]

    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    _, other = all_batches(mine, None)
    devices = {name: value.device.type for name, value in other.items()}
    assert devices == {"attention_mask": "cpu", "inputs_embeds": "meta", "labels": "meta"}

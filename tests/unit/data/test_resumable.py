# SPDX-License-Identifier: Apache-2.0
"""The sampler that goes on where it was saved: every sample once per epoch, whatever the workers had fetched."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from deepspeed_ds4sci.data.resumable import ResumableSampler

DATA = torch.arange(24)


def made(rank, replicas, workers=0, batch_size=2, **settings):
    sampler = ResumableSampler(DATA, num_replicas=replicas, rank=rank, seed=3, **settings)
    return sampler, DataLoader(DATA, batch_size=batch_size, sampler=sampler, num_workers=workers)


def taken(batches, count=None):
    return [batch.tolist() for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_with_the_batch_that_would_have_come_next(workers):
    sampler, loader = made(1, 2, workers)
    batches = sampler.track(loader)
    taken(batches, 2)
    state = sampler.state_dict()
    rest = taken(batches) + taken(sampler.track(loader))
    other, other_loader = made(1, 2, workers)
    other.load_state_dict(state)
    assert taken(other.track(other_loader)) + taken(other.track(other_loader)) == rest
    assert len(rest) == 4 + 6


def test_no_sample_is_lost_or_taken_twice_with_another_number_of_replicas():
    seen = []
    for rank in range(4):
        sampler, loader = made(rank, 4, batch_size=1)
        seen += sum(taken(sampler.track(loader), 2), [])
        state = sampler.state_dict()
    for rank in range(2):
        sampler, loader = made(rank, 2)
        sampler.load_state_dict(state)
        seen += sum(taken(sampler.track(loader)), [])
    assert sorted(seen) == DATA.tolist()


def test_epochs_differ_unless_asked_not_to():
    for reshuffle in (True, False):
        sampler, loader = made(0, 1, reshuffle=reshuffle)
        assert (taken(sampler.track(loader)) == taken(sampler.track(loader))) is not reshuffle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 20}, "the saved data position must be of length = 24, got 20"),
        ({"seed": 4}, "the saved data position must be of seed = 3, got 4"),
        ({"position": 3}, "3 samples of the epoch had been used, which 2 data-parallel ranks cannot have had"),
    ],
)
def test_refuses_a_position_that_means_nothing_here(change, message):
    sampler, _ = made(0, 2)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict({**sampler.state_dict(), **change})

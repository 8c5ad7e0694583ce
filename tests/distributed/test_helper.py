# SPDX-License-Identifier: Apache-2.0
"""The launcher of distributed tests: results in rank order, and a rank that fails, dies or hangs is reported."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.distributed import RankFailure, run_distributed


def rank_times(factor):
    return dist.get_rank() * factor


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("this rank does not like it")
    dist.barrier()


def die_in_a_step():
    """Rank 1 goes away in the middle of training; the others are in a collective with it."""
    if dist.get_rank() == 1:
        os._exit(17)
    dist.all_reduce(torch.ones(1))


def hang():
    time.sleep(600)


@pytest.mark.distributed(2)
def test_returns_what_each_rank_returned():
    assert run_distributed(rank_times, 2, 10) == [0, 10]


@pytest.mark.distributed(2)
def test_a_failing_rank_is_named_with_its_error():
    with pytest.raises(RankFailure, match=r"rank 1 of 2 ended with code 1:(.|\n)*this rank does not like it"):
        run_distributed(fail_on_rank_1, 2)


@pytest.mark.distributed(2)
def test_a_dead_rank_ends_the_launch_within_60_seconds():
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"of 2 ended with code"):
        run_distributed(die_in_a_step, 2)
    assert time.monotonic() - started < 60


@pytest.mark.distributed(1)
def test_a_launch_that_takes_too_long_is_ended():
    with pytest.raises(RankFailure, match=r"ranks \[0\] of 1 did not end in time"):
        run_distributed(hang, 1, timeout=5)

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of split sequences and sharded tables: exact resume, another number of ranks, damage, a crash."""

import pytest

from tests.distributed.checkpoint_worker import run
from tests.helpers.distributed import run_distributed


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    calls = [("resume", stage) for stage in range(4)] + [("damaged",), ("unsharded",)]
    return run_distributed(run, 2, with_folders(calls, tmp_path_factory))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    calls = [("other_size", 1, 2, 4), ("other_size", 3, 4, 2)]
    return run_distributed(run, 4, with_folders(calls, tmp_path_factory))


def with_folders(calls, factory):
    return [(name, str(factory.mktemp(name)), *arguments) for name, *arguments in calls]


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", range(4))
def test_resumes_bit_exactly(two_ranks, stage):
    for results in two_ranks:
        assert results["resume", stage][0] == []


@pytest.mark.distributed(2)
def test_the_table_is_saved_shard_by_shard(two_ranks):
    files = two_ranks[0]["resume", 2][1]
    assert {"ds4sci_position_table_00000_of_00002.pt", "ds4sci_position_table_00001_of_00002.pt"} <= set(files)


@pytest.mark.distributed(4)
@pytest.mark.parametrize("stage, saved, loaded", [(1, 2, 4), (3, 4, 2)])
def test_loads_with_another_number_of_ranks_per_sequence(four_ranks, stage, saved, loaded):
    for results in four_ranks:
        assert results["other_size", stage, saved, loaded] == []


@pytest.mark.distributed(2)
@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", "lacks parts of the position table: ds4sci_position_table_00001_of_00002.pt"),
        ("damaged", "ds4sci_position_table_00001_of_00002.pt is damaged and cannot be read"),
        ("shape", "the saved position table must be [96, 16], got [64, 16]"),
        ("crash", "RuntimeError: the machine stopped"),
    ],
)
def test_says_what_is_wrong_with_a_checkpoint(two_ranks, what, message):
    for results in two_ranks:
        assert message in results["damaged",][what]


@pytest.mark.distributed(2)
def test_a_crash_in_a_save_leaves_the_previous_checkpoint_chosen_and_loadable(two_ranks):
    for results in two_ranks:
        assert results["damaged",]["chosen"] == "global_step1"
        assert results["damaged",]["differs"] == []


@pytest.mark.distributed(2)
def test_takes_the_table_of_an_unsharded_checkpoint(two_ranks):
    assert all(results["unsharded",] for results in two_ranks)

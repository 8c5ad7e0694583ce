# SPDX-License-Identifier: Apache-2.0
"""Ranks that die: in a step the others end with an error; in a save the checkpoint before stays whole and chosen."""

import time
from pathlib import Path

import pytest

from tests.distributed.failure_worker import die_in_a_save, die_in_a_step, load_after_a_kill
from tests.helpers.distributed import RankFailure, run_distributed


@pytest.mark.distributed(2)
@pytest.mark.parametrize("mode", ["ulysses", "ring"])
def test_a_rank_that_dies_in_a_step_ends_the_others_with_an_error(mode, tmp_path):
    death = tmp_path / "death"
    with pytest.raises(RankFailure, match="rank 0 of 2 ended with code 1"):
        run_distributed(die_in_a_step, 2, mode, str(death))
    assert time.time() - death.stat().st_mtime < 60


@pytest.mark.distributed(2)
def test_a_rank_killed_in_a_save_leaves_the_checkpoint_before_whole_and_chosen(tmp_path):
    folders = {}
    for moment in ("writing", "naming", "choosing"):
        folders[moment] = str(tmp_path / moment)
        with pytest.raises(RankFailure, match=r"ended with code -9"):
            run_distributed(die_in_a_save, 2, folders[moment], moment)
    for results in run_distributed(load_after_a_kill, 2, folders):
        assert results == {moment: ("kept", []) for moment in folders}
    # What was cut off is cleared away by the next save of that name.
    assert not list(Path(folders["writing"]).glob("*.partial"))

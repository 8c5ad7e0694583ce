# SPDX-License-Identifier: Apache-2.0
"""The judge of test_engine_training.py fails for wrong versions of the package, and the memory check for a table that
is put together on a rank."""

import pytest

from tests.distributed.mutation_worker import MUTATIONS, run_mutations
from tests.distributed.test_engine_training import check
from tests.helpers.distributed import run_distributed


@pytest.fixture(scope="module")
def two_ranks():
    return run_distributed(run_mutations, 2)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_judge_notices(name, two_ranks):
    case, _ = MUTATIONS[name]
    with pytest.raises(AssertionError, match="of the largest value in"):
        check(case, [{case.id: mutations[name]} for mutations, _ in two_ranks])


@pytest.mark.distributed(2)
def test_no_rank_ever_holds_the_whole_table(two_ranks):
    for _, found in two_ranks:
        largest, whole, shapes = found[False]
        assert largest < whole
        assert shapes == {"weight": (4096, 16), "gradient": (4096, 16), "state": (4096, 16)}


@pytest.mark.distributed(2)
def test_the_memory_check_notices_a_gathered_table(two_ranks):
    for _, found in two_ranks:
        largest, whole, _ = found[True]
        assert largest >= whole

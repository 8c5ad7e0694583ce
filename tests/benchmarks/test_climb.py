# SPDX-License-Identifier: Apache-2.0
"""The search for the longest sequence that fits."""

import pytest

from tests.benchmarks.climb import PRECISION, Climb


def climbed(true_longest, capacity, bytes_per_token=2, start=128, limit=2**20):
    """The search over a machine on which exactly `true_longest` tokens fit; and the lengths that it tried."""
    search, tried = Climb(start, 8, limit, capacity), []
    while (length := search.next_length()) is not None:
        assert length % 8 == 0 and length not in tried and len(tried) < 60
        tried.append(length)
        search.record(length, length * bytes_per_token if length <= true_longest else None)
    return search, tried


@pytest.mark.parametrize("true_longest", [8, 100, 128, 300, 5000, 123456])
@pytest.mark.parametrize("prediction", [0.3, 1.0, 2.5])
def test_the_search_ends_within_its_precision(true_longest, prediction):
    search, _ = climbed(true_longest, capacity=int(2 * true_longest * prediction))
    assert search.longest <= true_longest < search.failed
    assert search.failed <= search.longest * PRECISION or search.failed - search.longest == 8


def test_a_right_prediction_costs_one_failure():
    search, tried = climbed(50000, capacity=100000)
    assert len([length for length in tried if length > 50000]) == 1
    assert len(tried) <= 6


def test_the_search_ends_at_the_limit():
    search, _ = climbed(2**30, capacity=2**40, limit=4096)
    assert (search.longest, search.failed) == (4096, None)


def test_nothing_fits():
    search, _ = climbed(0, capacity=100)
    assert search.longest == 0


def test_a_failure_below_what_fits_resolves_nothing():
    for failed, resolved in ((2048, False), (1024, False), (3072, False), (2200, True)):
        assert Climb(64, 8, 2**20, capacity=0, peaks={2048: 1}, failed=failed).resolved == resolved


def test_nothing_is_predicted_while_the_peak_hardly_grows():
    """As where an optimizer's step has it: the line through two such peaks leads anywhere."""
    flat = Climb(1024, 1024, limit=2**30, capacity=2**30, peaks={1024: 2**29, 2048: 2**29 + 1024})
    assert flat.next_length() == 3072  # twice the last, and a little below
    grows = Climb(1024, 1024, limit=2**30, capacity=2**30, peaks={1024: 2**27, 2048: 2**28})
    assert grows.next_length() == 7168  # 0.94 of 8192

# SPDX-License-Identifier: Apache-2.0
"""Finds the longest length that works, with few probes: each costs minutes."""

from collections.abc import Callable


def longest(
    works: Callable[[int], bool | None],
    guess: int,
    *,
    resolution: float = 0.1,
    multiple: int = 1024,
    limit: int = 2**23,
) -> tuple[int, int | None]:
    """Searches outwards from `guess`, then halves the gap.

    Args:
        works: whether a length trains; None: there is no time left to find out, and the search stops.
        guess: tried first, in tokens.
        resolution: the search ends when the shortest length that failed is at most so much above the longest that
            worked.
        multiple: lengths are multiples of it.
        limit: no longer length is tried.

    Returns:
        (longest length that worked, 0 if none; shortest that failed, None if none).
    """
    good, bad = 0, None
    length = _rounded(guess, multiple)
    while True:
        answer = works(length)
        if answer is None:
            return good, bad
        if answer:
            good = length
        else:
            bad = length
        if bad is None:
            next_one = min(following(good, multiple), limit)
        elif good == 0:
            next_one = _rounded(bad / 2, multiple)
        else:
            next_one = _rounded((good + bad) / 2, multiple)
        done = bad is not None and good and bad <= good * (1 + resolution)
        if done or next_one in (good, bad) or (bad is not None and next_one > bad):
            return good, bad
        length = next_one


def following(length: int, multiple: int) -> int:
    """The length that is tried after one that worked, while none has failed."""
    return max(_rounded(1.5 * length, multiple), length + multiple)


def _rounded(length: float, multiple: int) -> int:
    return max(multiple, round(length / multiple) * multiple)

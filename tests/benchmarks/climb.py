# SPDX-License-Identifier: Apache-2.0
"""The search for the longest sequence that fits, with as few failures as possible: each one costs a new process."""

from dataclasses import dataclass, field

PRECISION = 1.1
"""The shortest length that failed over the longest that fitted, at which a search ends."""

_BELOW = 0.94  # of the predicted length: where the slow climb starts
_STEP = 1.06
_FLAT = 0.1  # growth of the peak over that of the length, below which the peak does not grow yet


@dataclass
class Climb:
    """Which length to try next.

    Peak memory is close to linear in the length, so after two lengths the longest is predicted; the search goes there
    and climbs in small steps until it fails. Where the prediction was too high, it bisects. While the peak hardly
    grows, as where an optimizer's step has it, nothing is predicted.

    Args:
        start: the first length, tokens; multiple: of which every length is one; limit: none longer is tried.
        capacity: bytes that there are; precision: see PRECISION.
    """

    start: int
    multiple: int
    limit: int
    capacity: int
    peaks: dict[int, int] = field(default_factory=dict)  # of what fitted, by length; of 0: what is there before
    failed: int | None = None  # the shortest that did not
    precision: float = PRECISION

    @property
    def longest(self) -> int:
        """0 while nothing has fitted."""
        return max(self.peaks, default=0)

    @property
    def resolved(self) -> bool:
        return self.failed is not None and 0 < self.longest < self.failed <= self.longest * self.precision

    def record(self, seq_len: int, peak: int | None) -> None:
        """peak: bytes; None: out of memory."""
        if peak is not None:
            self.peaks[seq_len] = peak
        else:
            self.failed = seq_len if self.failed is None else min(seq_len, self.failed)

    def next_length(self) -> int | None:
        """None: the longest is known to the precision, or the limit fits."""
        last = self.longest
        if self.failed is not None:
            low, high = self._rounded(last) + self.multiple, self.failed - self.multiple
            if self.resolved or low > high:
                return None
            return min(max(self._rounded((max(last, self.multiple) * self.failed) ** 0.5), low), high)
        if last >= self.limit:
            return None
        if not last:
            return self.start
        wanted = 2 * last if len(self.peaks) < 2 else max(_STEP * last, _BELOW * self._predicted())
        return min(max(self._rounded(wanted), last + self.multiple), self.limit)

    def _predicted(self):
        (shorter, low), (longer, high) = sorted(self.peaks.items())[-2:]
        growth = (high - low) / (longer - shorter)
        return longer + (self.capacity - high) / growth if growth > _FLAT * low / longer else 2 * longer

    def _rounded(self, length):
        return int(length) // self.multiple * self.multiple

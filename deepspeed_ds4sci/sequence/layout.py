# SPDX-License-Identifier: Apache-2.0
"""Which rank of a sequence-parallel group holds which tokens. Pure arithmetic: no process group is needed.

A group of `size` ranks is a grid of `ulysses` x `ring` ranks; neighbours share a Ulysses group:

    rank = ring_rank * ulysses + ulysses_rank

The ring part cuts the sequence into 2 * ring chunks and gives rank i chunks i and 2 * ring - 1 - i (zig-zag), so that
causal attention costs every rank the same. The Ulysses part cuts what one ring rank holds into contiguous pieces;
joining the pieces in rank order restores it, which is what the all-to-all before attention does.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

Mode = str | dict[str, int]


def split_mode(size: int, mode: Mode) -> tuple[int, int]:
    """Ranks per Ulysses group and per ring.

    Args:
        size: ranks that share one sequence.
        mode: "ulysses", "ring", or {"ulysses": a, "ring": b} with a * b = size.

    Returns:
        (ulysses, ring), whose product is `size`.

    Raises:
        ValueError: another mode, or sizes that do not multiply to `size`.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 rank, got {size}")
    if mode == "ulysses":
        return size, 1
    if mode == "ring":
        return 1, size
    if not isinstance(mode, dict) or set(mode) != {"ulysses", "ring"}:
        raise ValueError(f'mode must be "ulysses", "ring" or {{"ulysses": a, "ring": b}}, got {mode!r}')
    ulysses, ring = mode["ulysses"], mode["ring"]
    if ulysses < 1 or ring < 1 or ulysses * ring != size:
        raise ValueError(f"mode must have ulysses * ring = size = {size}, got {ulysses} * {ring}")
    return ulysses, ring


def length_multiple(size: int, mode: Mode) -> int:
    """Tokens of which a sequence length must be a multiple to be cut evenly over `size` ranks."""
    ulysses, ring = split_mode(size, mode)
    return ulysses if ring == 1 else ring * math.lcm(2, ulysses)


def padded_length(seq_len: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `seq_len`, in tokens."""
    return -(-seq_len // multiple) * multiple


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one sequence are.

    Args:
        seq_len: tokens of the whole sequence, padding included; a multiple of `length_multiple(size, mode)`.
        size: ranks that share the sequence.
        mode: see `split_mode`.

    Raises:
        ValueError: a mode that does not fit `size`, or a length that cannot be cut evenly.
    """

    seq_len: int
    size: int
    mode: Mode = "ulysses"

    def __post_init__(self):
        multiple = length_multiple(self.size, self.mode)
        if self.seq_len < multiple or self.seq_len % multiple:
            raise ValueError(
                f"seq_len must be a positive multiple of {multiple} tokens for size {self.size} and mode "
                f"{self.mode!r}, got {self.seq_len}; pad it to {padded_length(max(self.seq_len, 1), multiple)}"
            )

    @cached_property
    def _grid(self) -> tuple[int, int]:
        return split_mode(self.size, self.mode)

    @property
    def ulysses(self) -> int:
        """Ranks that exchange heads for tokens."""
        return self._grid[0]

    @property
    def ring(self) -> int:
        """Ranks around which key and value blocks travel."""
        return self._grid[1]

    @property
    def local_len(self) -> int:
        """Tokens that one rank holds."""
        return self.seq_len // self.size

    def ulysses_rank(self, rank: int) -> int:
        """Place of `rank` in its Ulysses group."""
        return self._checked(rank) % self.ulysses

    def ring_rank(self, rank: int) -> int:
        """Place of `rank` in its ring."""
        return self._checked(rank) // self.ulysses

    def attention_ranges(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Global positions of the queries that `rank` works on inside attention, as [start, stop) ranges in order.

        Under Ulysses that is more than the rank holds outside of attention: the tokens of its whole Ulysses group.
        """
        ring_rank = self.ring_rank(rank)
        if self.ring == 1:
            return ((0, self.seq_len),)
        chunk = self.seq_len // (2 * self.ring)
        mirror = 2 * self.ring - 1 - ring_rank
        return ((ring_rank * chunk, (ring_rank + 1) * chunk), (mirror * chunk, (mirror + 1) * chunk))

    def ranges(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Global positions that `rank` holds, as [start, stop) ranges in the order of its local tokens."""
        low = self.ulysses_rank(rank) * self.local_len
        high = low + self.local_len
        held, offset = [], 0  # offset: local tokens of the ring rank before this range
        for start, stop in self.attention_ranges(rank):
            first, last = max(low - offset, 0), min(high - offset, stop - start)
            if first < last:
                held.append((start + first, start + last))
            offset += stop - start
        return tuple(held)

    def positions(self, rank: int, device: torch.device | str | None = None) -> torch.Tensor:
        """[local_len] int64: the global position of each local token of `rank`."""
        return _arange(self.ranges(rank), device)

    def attention_positions(self, rank: int, device: torch.device | str | None = None) -> torch.Tensor:
        """[seq_len / ring] int64: the global position of each query of `rank` inside attention."""
        return _arange(self.attention_ranges(rank), device)

    def shard(self, tensor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
        """What `rank` holds of a tensor whose axis `dim` is the whole sequence. A view where one range suffices."""
        if tensor.shape[dim] != self.seq_len:
            raise ValueError(f"tensor must have {self.seq_len} tokens on axis {dim}, got shape {tuple(tensor.shape)}")
        pieces = [tensor.narrow(dim, start, stop - start) for start, stop in self.ranges(rank)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def unshard(self, shards: list[torch.Tensor], dim: int) -> torch.Tensor:
        """The whole tensor from the shards of all ranks, in rank order: the inverse of `shard`."""
        if len(shards) != self.size:
            raise ValueError(f"shards must have one tensor for each of {self.size} ranks, got {len(shards)}")
        pieces = []
        for rank, shard in enumerate(shards):
            if shard.shape[dim] != self.local_len:
                raise ValueError(
                    f"shard of rank {rank} must have {self.local_len} tokens on axis {dim}, got {tuple(shard.shape)}"
                )
            ranges = self.ranges(rank)
            parts = shard.split([stop - start for start, stop in ranges], dim)
            pieces += [(start, part) for (start, _), part in zip(ranges, parts, strict=True)]
        return torch.cat([part for _, part in sorted(pieces, key=lambda piece: piece[0])], dim)

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.size:
            raise ValueError(f"rank must be in [0, {self.size}), got {rank}")
        return rank


def _arange(ranges, device) -> torch.Tensor:
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in ranges])

# SPDX-License-Identifier: Apache-2.0
"""A learned position table of which each rank of a sequence-parallel group holds an equal slice of rows.

Weight, gradient and optimizer state of the table are [rows per rank, dim] on each rank; the whole table never exists
on one. Rows are asked for by number and may be on any rank.

Axes: N positions of the whole table, P ranks, R = ceil(N / P) rows per rank, D embedding dim.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

_DRAW_ELEMENTS = 2**22  # 16 MiB of fp32 at a time while initial values are drawn
_INVALID = -1


@dataclass(frozen=True)
class TableShard:
    """Some rows of a table: what is saved, independent of how many ranks there were."""

    rows: torch.Tensor  # [stop - start, D], CPU or device
    start: int
    stop: int
    num_positions: int

    def __post_init__(self):
        if self.rows.dim() != 2 or not 0 <= self.start <= self.stop <= self.num_positions:
            raise ValueError(
                f"a shard must be rows [start, stop) of {self.num_positions}, got [{self.start}, {self.stop}) and "
                f"shape {list(self.rows.shape)}"
            )
        if self.rows.shape[0] != self.stop - self.start:
            raise ValueError(
                f"a shard of rows [{self.start}, {self.stop}) must have {self.stop - self.start} rows, got "
                f"{self.rows.shape[0]}"
            )


def row_range(num_positions: int, size: int, rank: int) -> tuple[int, int]:
    """[start, stop): the rows of a table that `rank` of `size` holds. All but the last ranks hold ceil(N / P)."""
    per_rank = -(-num_positions // size)
    return min(rank * per_rank, num_positions), min((rank + 1) * per_rank, num_positions)


def resplit(
    shards: Iterable[TableShard], num_positions: int, dim: int, start: int, stop: int, out: torch.Tensor
) -> None:
    """Copies rows [start, stop) of a table into out[: stop - start] from shards cut in any way.

    One shard at a time is looked at, so a lazy iterable keeps one in memory. Serves optimizer state as well.

    Args:
        shards: `TableShard`s that together hold every wanted row; later ones win where they overlap.
        out: [at least stop - start, D]; changed.

    Raises:
        ValueError: a shard of a table of another shape, or rows that no shard holds.
    """
    missing = torch.ones(stop - start, dtype=torch.bool)
    for shard in shards:
        if shard.num_positions != num_positions or shard.rows.shape[1] != dim:
            raise ValueError(
                f"the saved position table must be [{num_positions}, {dim}], got "
                f"[{shard.num_positions}, {shard.rows.shape[1]}]"
            )
        first, last = max(start, shard.start), min(stop, shard.stop)
        if first < last:
            out[first - start : last - start].copy_(shard.rows[first - shard.start : last - shard.start])
            missing[first - start : last - start] = False
    if missing.any():
        lost = missing.nonzero().flatten() + start
        raise ValueError(
            f"no shard holds {lost.numel()} of the position table's rows [{start}, {stop}); the first is {lost[0]}, "
            f"the last {lost[-1]}"
        )


class ShardedPositionEmbedding(nn.Module):
    """`nn.Embedding(num_positions, dim)` for positions, with its rows spread over the ranks of a group.

    The weight is [R, D] on every rank (rows past the end of the table are zero and never used), so the ranks' shapes
    are equal. It is a different parameter on each rank of the group: its gradient, which arrives summed over all the
    group's tokens, must be reduced over data-parallel replicas only. `weight.ds4sci_shard` is its (start, stop).

    Args:
        num_positions: N; dim: D.
        group: ranks that share the sequence and the table; None: this rank holds it all.
        init_std: standard deviation of the initial normal values; 1 is nn.Embedding's.
        generator: CPU generator to draw from; None: torch's default one. Every rank must bring it in the same state.
            The draw, and the state it leaves, is that of `torch.nn.init.normal_` on the whole fp32 table.
        device, dtype: of the weight; on "meta" nothing is drawn until `reset_parameters`.
    """

    def __init__(
        self,
        num_positions: int,
        dim: int,
        group: dist.ProcessGroup | None = None,
        *,
        init_std: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_positions < 1 or dim < 1:
            raise ValueError(f"num_positions and dim must be at least 1, got {num_positions} and {dim}")
        self._set_up(num_positions, dim, group, init_std)
        self.weight = nn.Parameter(torch.empty(self.rows_per_rank, dim, device=device, dtype=dtype))
        self._tag()
        if self.weight.device.type != "meta":
            self.reset_parameters(generator)

    @classmethod
    def from_table(cls, table: torch.Tensor, group: dist.ProcessGroup | None, init_std: float = 1.0):
        """This rank's part of a table [N, D] that exists already, such as a loaded model's. Keeps device and dtype."""
        self = cls(*table.shape, group, init_std=init_std, device="meta", dtype=table.dtype)
        weight = table.new_zeros(self.weight.shape)
        weight[: self.stop - self.start].copy_(table.detach()[self.start : self.stop])
        self.weight = nn.Parameter(weight, requires_grad=table.requires_grad)
        self._tag()
        return self

    def _set_up(self, num_positions, dim, group, init_std):
        self.num_positions, self.dim, self.group, self.init_std = num_positions, dim, group, init_std
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.rows_per_rank = -(-num_positions // self.size)
        self.start, self.stop = row_range(num_positions, self.size, self.rank)

    def _tag(self):
        self.weight.ds4sci_shard = (self.start, self.stop)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the whole table piece by piece on the CPU and keeps this rank's rows."""
        self.weight.zero_()
        held = self.weight[: self.stop - self.start]
        for start, rows in _drawn_rows(self.num_positions, self.dim, self.init_std, generator):
            first, last = max(start, self.start), min(start + len(rows), self.stop)
            if first < last:
                held[first - self.start : last - self.start].copy_(rows[first - start : last - start])

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Rows for the positions that this rank asks for.

        All ranks of the group must call it together; each may ask for any positions, and any number of them.

        Args:
            position_ids: integers of any shape, in [0, N).

        Returns:
            [*position_ids.shape, D], dtype of the weight.

        Raises:
            ValueError: on every rank, if any rank asks for a position outside the table.
        """
        if self.size == 1:
            check_position_ids(position_ids, self.num_positions)
            return F.embedding(position_ids, self.weight)
        # A row is fetched once however many samples use it.
        wanted, place = position_ids.reshape(-1).unique(return_inverse=True)  # sorted, so in order of owner
        rows = _FetchRows.apply(self.weight, wanted, self)
        return F.embedding(place.view(position_ids.shape), rows)

    def extra_repr(self) -> str:
        return f"{self.num_positions}, {self.dim}, rows=[{self.start}, {self.stop}), ranks={self.size}"

    def shard(self, tensor: torch.Tensor | None = None) -> TableShard:
        """This rank's rows in the form to save: of the weight, or of a tensor of its shape such as optimizer state."""
        tensor = self.weight.detach() if tensor is None else tensor
        return TableShard(tensor[: self.stop - self.start], self.start, self.stop, self.num_positions)

    @torch.no_grad()
    def load_shards(self, shards: Iterable[TableShard]) -> None:
        """Takes this rank's rows from shards saved by any number of ranks. See `resplit` for what is refused.

        A refused load leaves the weight as it was.
        """
        rows = torch.zeros_like(self.weight)
        resplit(shards, self.num_positions, self.dim, self.start, self.stop, rows)
        self.weight.copy_(rows)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.pop(prefix + "weight")
        destination[prefix + "weight"] = weight[: self.stop - self.start]
        destination[prefix + "rows"] = torch.tensor([self.start, self.stop, self.num_positions])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight, rows = state_dict.get(prefix + "weight"), state_dict.get(prefix + "rows")
        if weight is None:
            if strict:
                missing.append(prefix + "weight")
            return
        # Without a row range it is a whole table, such as an unsharded model's.
        start, stop, positions = (0, len(weight), len(weight)) if rows is None else rows.tolist()
        try:
            self.load_shards([TableShard(weight, start, stop, positions)])
        except ValueError as error:
            errors.append(f'While loading "{prefix}weight": {error}')


class _FetchRows(torch.autograd.Function):
    """Rows by number from the ranks that own them; gradients go back to the owners, summed in fp32."""

    @staticmethod
    def forward(ctx, weight, wanted, table):
        owner = wanted.div(table.rows_per_rank, rounding_mode="floor")
        invalid = bool(wanted.numel()) and (wanted[0] < 0 or wanted[-1] >= table.num_positions)
        counts = torch.full((table.size,), _INVALID) if invalid else torch.bincount(owner, minlength=table.size)
        sent = counts.to(wanted.device)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=table.group)
        asked, answered = sent.tolist(), received.tolist()  # rows that this rank asks of, and gives to, each rank
        if invalid or _INVALID in answered:
            # Every rank learns of it: the others would wait for ever.
            culprit = table.rank if invalid else answered.index(_INVALID)
            detail = f", from {int(wanted[0])} to {int(wanted[-1])}" if invalid else ""
            raise ValueError(
                f"position_ids must be in [0, {table.num_positions}); "
                f"rank {culprit} of {table.size} asks for others{detail}"
            )
        ids = wanted.new_empty(sum(answered))
        dist.all_to_all_single(ids, wanted, answered, asked, group=table.group)
        ctx.local = ids - table.start
        ctx.splits, ctx.table, ctx.shape = (asked, answered), table, weight.shape
        rows = weight.new_empty(wanted.numel(), table.dim)
        dist.all_to_all_single(rows, weight[ctx.local], asked, answered, group=table.group)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, drows):
        asked, answered = ctx.splits
        received = drows.new_empty(sum(answered), drows.shape[1])
        dist.all_to_all_single(received, drows.contiguous(), answered, asked, group=ctx.table.group)
        dtype = torch.promote_types(drows.dtype, torch.float32)
        dweight = torch.zeros(ctx.shape, dtype=dtype, device=drows.device)
        # Rank by rank, in which no row comes twice: the order of summation, and so the result, is fixed.
        for ids, part in zip(ctx.local.split(answered), received.split(answered), strict=True):
            dweight[ids] += part.to(dtype)
        return dweight.to(drows.dtype), None, None


def check_position_ids(position_ids: torch.Tensor, num_positions: int) -> None:
    """Raises ValueError if a position is outside of a table of so many rows."""
    if position_ids.numel():
        low, high = (int(bound) for bound in position_ids.aminmax())
        if low < 0 or high >= num_positions:
            raise ValueError(f"position_ids must be in [0, {num_positions}), got values from {low} to {high}")


def _drawn_rows(num_positions, dim, std, generator):
    """(first row, rows [n, dim] fp32) in order: the same numbers as one `normal_` of the whole table.

    torch fills fp32 tensors on the CPU in groups of 16 from one stream, and draws the last group anew where it is not
    full. So pieces of a multiple of 16 elements, the last one with at least 16, continue the stream as one draw would.
    """
    granule = 16 // math.gcd(16, dim)  # rows that make a multiple of 16 elements
    piece = max(_DRAW_ELEMENTS // (dim * granule), 1) * granule
    start = 0
    while start < num_positions:
        rows = min(piece, num_positions - start)
        if num_positions - start - rows < granule:  # too short a rest for a draw of its own
            rows = num_positions - start
        yield start, torch.empty(rows, dim).normal_(0.0, std, generator=generator)
        start += rows

# SPDX-License-Identifier: Apache-2.0
"""Exact attention in tiles, in plain PyTorch: the CPU path, and the fallback on devices that have no kernel.

Forward: online softmax over key tiles. Backward: the weights are computed again from lse, tile by tile. The only
tensors with one element per logit are a few tiles of bounded size, reused for the whole call, so memory grows with L.

On a CPU each thread has some of the heads to itself. A tile covers these heads of some rows, for one block of queries
and one of keys: enough work for each of torch's operations, small enough to stay in cache between them. Two passes
over a tile ride in an extra column of the operands instead:

    logits = pair + [q s, 1] [k, mask]^T          dP - delta = [do, -delta] [v, 1]^T

exp(x) is written exp2(x log2 e): on a CPU torch's exp2 takes half the time of its exp. The logits themselves stay in
natural units, so that they round as those of plain PyTorch do. Backward computes them by the very same products.

Sums are fp32 (fp64 for fp64) and always taken in the same order, so results are bit-identical from run to run.

Axes: B batch, N rows, L attended length (Lq queries, Lk keys), H heads, D head dim. G = b n h: matrices of one group.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._precision import in_own_precision
from ._workers import run_side_by_side
from .reference import NEG_INF, compute_dtype, lse_dtype, row_shift

LOG2_E = math.log2(math.e)
# Elements of a tile. CPU: for each thread 1.5 MiB in fp32, of which two fit its share of the last-level cache (half to
# twice as much is as fast, less is slower). Elsewhere: enough to fill the device.
TILE_ELEMENTS_PER_THREAD = 3 << 17
TILE_ELEMENTS_ELSEWHERE = 1 << 25
MAX_TILE_KEYS = 512
MIN_TILE_QUERIES = 32
MIN_LOGITS_FOR_WORKERS = 1 << 17  # about a millisecond of work
# Finite biases stop here, after `row_shift`. Far below any real logit, yet close enough to keep digits of q k^T where
# every key that a row has left carries such a bias; at -1e10 the rounding of lse would be 1024, and P its power of 2.
LOWEST_BIAS = {torch.float32: -(2.0**15), torch.float64: -(2.0**44)}
# Stands in for the maximum of a row without keys: finite, so that -inf less it is -inf and not NaN.
LOWEST_MAXIMUM = -1e38


def _steps(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _blocks(length: int, largest: int) -> list[slice]:
    """Even blocks of at most about `largest`, multiples of 8 except the last."""
    count = max(1, math.ceil(length / largest))
    size = min(length, 8 * math.ceil(length / count / 8))
    return _steps(length, size)


@dataclass(frozen=True)
class _Tiling:
    """Which part of the problem is worked on at a time: groups of (batch, rows), then blocks of queries and keys."""

    batches: list[slice]
    rows: list[slice]
    queries: list[slice]
    keys: list[slice]

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> "_Tiling":
        batch, rows, q_len, heads, _ = q.shape
        elements = TILE_ELEMENTS_ELSEWHERE
        if q.device.type == "cpu":
            elements = TILE_ELEMENTS_PER_THREAD * torch.get_num_threads()
        keys = _blocks(k.shape[2], MAX_TILE_KEYS)
        per_query = heads * keys[0].stop
        queries = _blocks(q_len, max(MIN_TILE_QUERIES, elements // per_query))
        per_row = per_query * queries[0].stop
        rows_together = min(rows, max(1, elements // per_row))
        batches_together = max(1, elements // (per_row * rows)) if rows_together == rows else 1
        return cls(_steps(batch, batches_together), _steps(rows, rows_together), queries, keys)


def _mask_logits(mask_bias: Tensor | None, lead: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """The mask as [B, N, Lk] logits, less `row_shift`; -inf where dropped."""
    if mask_bias is None:
        return None
    if mask_bias.dtype == torch.bool:
        mask = torch.zeros_like(mask_bias, dtype=dtype).masked_fill_(~mask_bias, NEG_INF)
    else:
        mask = mask_bias.to(dtype)
        dropped = mask == NEG_INF
        mask = (mask - row_shift(mask.amax(dim=-1, keepdim=True))).clamp_(min=LOWEST_BIAS[dtype])
        mask.masked_fill_(dropped, NEG_INF)
    return mask[:, :, 0, 0].expand(*lead, -1)


class _PairLogits:
    """Tiles [b, 1, H, q, k] of the pair bias as logits, less `row_shift`; -inf where dropped."""

    def __init__(self, pair_bias: Tensor, dtype: torch.dtype):
        self.bias = pair_bias
        self.dtype = dtype
        smallest, largest = torch.aminmax(pair_bias, dim=-1, keepdim=True)
        self.shift = row_shift(largest.to(dtype))  # [B, 1, H, Lq, 1]
        # Whether a tile is just the bias. Asking needs values on the host; other devices always take the longer way.
        self.is_plain = (
            pair_bias.device.type == "cpu"
            and smallest.min().item() >= LOWEST_BIAS[dtype]
            and not torch.count_nonzero(self.shift)
        )

    def of_heads(self, heads: slice) -> "_PairLogits":
        part = copy.copy(self)
        if self.bias.shape[2] > 1:
            part.bias, part.shift = self.bias[:, :, heads], self.shift[:, :, heads]
        return part

    def tile(self, b: slice, i: slice, j: slice) -> Tensor:
        b = b if self.bias.shape[0] > 1 else slice(0, 1)
        bias = self.bias[b, :, :, i, j]
        if self.is_plain:
            return bias
        tile = torch.sub(bias.to(self.dtype), self.shift[b, :, :, i]).clamp_(min=LOWEST_BIAS[self.dtype])
        return tile.masked_fill_(bias == NEG_INF, NEG_INF)


class _Scratch:
    """Memory of one call, taken once and handed out as views of the size a tile needs."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self._like = like
        self._dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = self._like.new_empty(size, dtype=self._dtype)
        return buffer[:size].view(shape)


def _gather(out: Tensor, x: Tensor, scale: float | None = None) -> None:
    """x [b, n, L, H, D] -> the first D columns of out [G, L, columns], times `scale`, in out's dtype."""
    batch, rows, length, heads, head_dim = x.shape
    view = out.view(batch, rows, heads, length, -1)[..., :head_dim]
    view.copy_(x.transpose(2, 3))
    if scale is not None:
        view.mul_(scale)


def _scatter(out: Tensor, x: Tensor, scale: float | None = None, factor: Tensor | None = None) -> None:
    """x [G, L, D], times `scale` and `factor` [b, n, L, H, D] -> out [b, n, L, H, D]."""
    batch, rows, length, heads, head_dim = out.shape
    if scale is not None:
        x.mul_(scale)
    x = x.view(batch, rows, heads, length, head_dim).transpose(2, 3)
    if factor is None:
        out.copy_(x)
    else:
        torch.mul(x, factor, out=out)


def _opened(scratch: _Scratch, gate: Tensor | None) -> Tensor | None:
    """sigmoid(gate) of gate [b, n, L, H, D], which stays in the layout of tables: nothing is transposed for it."""
    if gate is None:
        return None
    opened = scratch.take("gate", *gate.shape)
    return torch.sigmoid(gate.to(opened.dtype), out=opened)


def _gather_operands(scratch: _Scratch, q: Tensor, k: Tensor, mask: Tensor | None, softmax_scale: float):
    """[q s, 1] as [G, Lq, D + 1] and [k, mask] as [G, Lk, D + 1]: operands of the logits, the same in both passes."""
    batch, rows, q_len, heads, head_dim = q.shape
    k_len = k.shape[2]
    group = batch * rows * heads
    queries = scratch.take("q", group, q_len, head_dim + 1)
    _gather(queries, q, softmax_scale)
    queries[..., head_dim] = 1.0
    keys = scratch.take("k", group, k_len, head_dim + 1)
    _gather(keys, k)
    column = keys.view(batch, rows, heads, k_len, -1)[..., head_dim]
    if mask is None:
        column.zero_()
    else:
        column.copy_(mask.unsqueeze(2))
    return queries, keys


def _logit_tile(
    scratch: _Scratch, queries: Tensor, keys: Tensor, pair_tile: Tensor | None, lead: tuple[int, ...]
) -> Tensor:
    """[G, q, k] = pair + queries keys^T; lead: (b, n, H)."""
    logits = scratch.take("logits", queries.shape[0], queries.shape[1], keys.shape[1])
    if pair_tile is None:
        return torch.bmm(queries, keys.transpose(1, 2), out=logits)
    logits.view(*lead, *logits.shape[1:]).copy_(pair_tile)
    return logits.baddbmm_(queries, keys.transpose(1, 2))


def _exp_(x: Tensor) -> Tensor:
    return x.mul_(LOG2_E).exp2_()


def _forward_group(part, b, softmax_scale, mask, q, k, v, gate, o, lse):
    """One group of rows: q, k, v, gate, o [b, n, L, H, D], mask [b, n, Lk], lse [b, n, H, Lq]; writes o and lse."""
    scratch, tiling, pair = part.scratch, part.tiling, part.pair
    batch, rows, _, heads, head_dim = q.shape
    lead, group = (batch, rows, heads), batch * rows * heads
    queries, keys = _gather_operands(scratch, q, k, mask, softmax_scale)
    values = scratch.take("v", group, k.shape[2], head_dim)
    _gather(values, v)
    for i in tiling.queries:
        length = i.stop - i.start
        acc = scratch.take("acc", group, length, head_dim)
        maximum = total = None
        for j in tiling.keys:
            pair_tile = None if pair is None else pair.tile(b, i, j)
            weights = _logit_tile(scratch, queries[:, i], keys[:, j], pair_tile, lead)
            tile_maximum = weights.amax(dim=-1, keepdim=True).clamp_(min=LOWEST_MAXIMUM)
            if maximum is None:
                maximum = tile_maximum
                total = _exp_(weights.sub_(maximum)).sum(dim=-1, keepdim=True)
                torch.bmm(weights, values[:, j], out=acc)
                continue
            torch.maximum(maximum, tile_maximum, out=tile_maximum)
            shrink = _exp_(maximum.sub_(tile_maximum))
            maximum = tile_maximum
            total.mul_(shrink).add_(_exp_(weights.sub_(maximum)).sum(dim=-1, keepdim=True))
            acc.mul_(shrink).baddbmm_(weights, values[:, j])
        empty = total == 0
        row_lse = (maximum + total.to(lse.dtype).log()).masked_fill_(empty, math.inf)
        lse[:, :, :, i] = row_lse.view(*lead, length)
        opened = _opened(scratch, None if gate is None else gate[:, :, i])
        _scatter(o[:, :, i], acc.div_(total.add_(empty)), factor=opened)


def _accumulate(tiles: dict, scratch: _Scratch, name: str, index: slice, left: Tensor, right: Tensor) -> None:
    """tiles[index] += left right. Each block has its own memory because batched matmul wants a contiguous result."""
    tile = tiles.get(index.start)
    if tile is None:
        tile = scratch.take(f"{name}{index.start}", left.shape[0], left.shape[1], right.shape[2])
        tiles[index.start] = torch.bmm(left, right, out=tile)
    else:
        tile.baddbmm_(left, right)


def _split_lse(lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(lse rounded to `dtype`, exp of minus what that left over): weights = exp(logits - first) * second."""
    rounded = lse.to(dtype)
    rest = (rounded - lse).exp_()
    return rounded, rest.masked_fill_(rounded == math.inf, 0.0).to(dtype)


def _gather_gated(scratch: _Scratch, douts: Tensor, do: Tensor, o: Tensor, opened: Tensor, dgate: Tensor | None):
    """[do * opened, -delta] -> douts [G, L, D + 1] for do, o, opened [b, n, L, H, D]; writes dgate unless unwanted.

    The gated o and its gradient are enough: their product is that of the ungated ones, so delta is the same.
    """
    batch, rows, length, heads, head_dim = do.shape
    view = douts.view(batch, rows, heads, length, -1)
    products = torch.mul(do.to(opened.dtype), o, out=scratch.take("products", *do.shape))
    torch.neg(products.sum(dim=-1).transpose(2, 3), out=view[..., head_dim])
    torch.mul(do.transpose(2, 3), opened.transpose(2, 3), out=view[..., :head_dim])
    if dgate is not None:
        torch.addcmul(products, products, opened, value=-1.0, out=dgate)  # do * o * (1 - opened)


def _backward_group(part, b, softmax_scale, mask, q, k, v, gate, do, o, dq, dk, dv, dgate, lse, dmask, dpair):
    """One group, as in `_forward_group`. Writes dq, dk, dv, dgate, adds to dmask [b, n, Lk], dpair; None: unwanted."""
    scratch, tiling, pair = part.scratch, part.tiling, part.pair
    batch, rows, q_len, heads, head_dim = q.shape
    lead, group = (batch, rows, heads), batch * rows * heads
    queries, keys = _gather_operands(scratch, q, k, mask, softmax_scale)
    values = scratch.take("v", group, k.shape[2], head_dim + 1)
    _gather(values, v)
    values[..., head_dim] = 1.0
    douts = scratch.take("do", group, q_len, head_dim + 1)
    if gate is None:
        _gather(douts, do)
        products = scratch.take("products", group, q_len, head_dim)
        _gather(products, o)
        torch.neg(products.mul_(douts[..., :head_dim]).sum(dim=-1), out=douts[..., head_dim])
    else:
        _gather_gated(scratch, douts, do, o, _opened(scratch, gate), dgate)
    row_lse, factor = _split_lse(lse.reshape(group, q_len, 1), douts.dtype)
    douts.mul_(factor)  # all gradients are linear in [do, -delta], so the weights need not be touched
    need_dlogits = any(x is not None for x in (dq, dk, dmask, dpair))
    dq_tiles, dk_tiles, dv_tiles = {}, {}, {}
    for i in tiling.queries:
        for j in tiling.keys:
            pair_tile = None if pair is None else pair.tile(b, i, j)
            weights = _exp_(_logit_tile(scratch, queries[:, i], keys[:, j], pair_tile, lead).sub_(row_lse[:, i]))
            if dv is not None:
                _accumulate(dv_tiles, scratch, "dv", j, weights.transpose(1, 2), douts[:, i, :head_dim])
            if not need_dlogits:
                continue
            dlogits = scratch.take("dlogits", *weights.shape)
            torch.bmm(douts[:, i], values[:, j].transpose(1, 2), out=dlogits)
            dlogits.mul_(weights)
            if dq is not None:
                _accumulate(dq_tiles, scratch, "dq", i, dlogits, keys[:, j, :head_dim])
            if dk is not None:
                _accumulate(dk_tiles, scratch, "dk", j, dlogits.transpose(1, 2), queries[:, i, :head_dim])
            if dmask is not None:
                dmask[:, :, j] += dlogits.sum(dim=1).view(*lead, -1).sum(dim=2)
            if dpair is not None:
                total = dpair[b if dpair.shape[0] > 1 else slice(0, 1), :, :, i, j]
                shared = (1, 2) if dpair.shape[2] < heads else (1,)
                total += dlogits.view(*lead, *dlogits.shape[1:]).sum(dim=shared, keepdim=True)
    for out, tiles, blocks, scale in (
        (dq, dq_tiles, tiling.queries, softmax_scale),
        (dk, dk_tiles, tiling.keys, None),
        (dv, dv_tiles, tiling.keys, None),
    ):
        if out is not None:
            for block in blocks:
                _scatter(out[:, :, block], tiles[block.start], scale)


class _Call:
    """What all parts of one call share. Batch entries that share a pair bias, or have none, are just rows."""

    def __init__(self, q: Tensor, mask_bias: Tensor | None, pair_bias: Tensor | None):
        self.dtype = compute_dtype(q.dtype)
        batch, rows = q.shape[:2]
        own_pair_bias = pair_bias is not None and pair_bias.shape[0] > 1
        self.lead = (batch, rows) if own_pair_bias else (1, batch * rows)
        mask = _mask_logits(mask_bias, (batch, rows), self.dtype)
        self.mask = None if mask is None else mask.reshape(*self.lead, -1)
        self.pair = None if pair_bias is None else _PairLogits(pair_bias, self.dtype)

    def fold(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Each of `tensors` [B, N, ...] with its first axes as in `lead`; views of those that are contiguous."""
        return tuple(None if x is None else x.reshape(*self.lead, *x.shape[2:]) for x in tensors)

    def head_parts(self, q: Tensor, k: Tensor) -> list[slice]:
        """Which heads each worker gets. Heads that share their pair bias stay together: they add to the same dpair."""
        heads = q.shape[3]
        num_workers = min(heads, torch.get_num_threads())
        small = q.shape[:4].numel() * k.shape[2] < MIN_LOGITS_FOR_WORKERS
        if q.device.type != "cpu" or small or (self.pair is not None and self.pair.bias.shape[2] < heads):
            num_workers = 1
        return _steps(heads, math.ceil(heads / num_workers))


class _Part:
    """Some heads of a call, with scratch memory and tiles of their own; made by the thread that works on them."""

    def __init__(self, call: _Call, heads: slice, q: Tensor, k: Tensor):
        self.mask = call.mask
        self.pair = None if call.pair is None else call.pair.of_heads(heads)
        self.scratch = _Scratch(q, call.dtype)
        self.tiling = _Tiling.of(q, k)

    def groups(self, *tensors: Tensor | None):
        """(b, the mask and each of `tensors` [B, N, ...] restricted to one group) for every group."""
        for b in self.tiling.batches:
            for n in self.tiling.rows:
                yield b, tuple(None if x is None else x[b, n] for x in (self.mask, *tensors))


def _of_heads(heads: slice, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each of `tensors` [B, N, L, H, D] restricted to some heads."""
    return tuple(None if x is None else x[:, :, :, heads] for x in tensors)


class TiledImplementation:
    """The dispatch table's entry for this file; see `_dispatch.Implementation` for the contract."""

    name = "tiled"

    def unsupported_reason(self, problem) -> str | None:
        return None

    @in_own_precision
    def forward(self, q, k, v, mask_bias, pair_bias, gate, softmax_scale):
        batch, rows, q_len, heads, _ = q.shape
        o = q.new_empty(q.shape)
        lse = q.new_empty((batch, rows, heads, q_len), dtype=lse_dtype(q))
        call = _Call(q, mask_bias, pair_bias)
        *operands, lse_rows = call.fold(q, k, v, gate, o, lse)
        parts = call.head_parts(q, k)

        def work(heads: slice) -> None:
            tensors = _of_heads(heads, *operands)
            part = _Part(call, heads, *tensors[:2])
            for b, group in part.groups(*tensors, lse_rows[:, :, heads]):
                _forward_group(part, b, softmax_scale, *group)

        run_side_by_side(work, parts)
        return o, lse

    @in_own_precision
    def backward(self, do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, wanted):
        call = _Call(q, mask_bias, pair_bias)
        dqkv = tuple(q.new_empty(x.shape) if w else None for x, w in zip((q, k, v), wanted[:3], strict=True))
        dgate = q.new_empty(q.shape) if wanted[5] else None
        dpair = q.new_zeros(pair_bias.shape, dtype=call.dtype) if wanted[4] else None
        *operands, lse_rows = call.fold(q, k, v, gate, do, o, *dqkv, dgate, lse)
        parts = call.head_parts(q, k)

        def work(heads: slice) -> Tensor | None:
            tensors = _of_heads(heads, *operands)
            part = _Part(call, heads, *tensors[:2])
            dmask_part = q.new_zeros((*call.lead, k.shape[2]), dtype=call.dtype) if wanted[3] else None
            dpair_part = None if dpair is None else dpair[:, :, heads]
            for b, group in part.groups(*tensors, lse_rows[:, :, heads], dmask_part):
                _backward_group(part, b, softmax_scale, *group, dpair_part)
            return dmask_part

        dmask_parts = run_side_by_side(work, parts)
        dmask = None
        if wanted[3]:
            dmask = torch.stack(dmask_parts).sum(dim=0).view(*q.shape[:2], 1, 1, -1)
            dmask = dmask.sum_to_size(mask_bias.shape).to(mask_bias.dtype)
        return (*dqkv, dmask, None if dpair is None else dpair.to(pair_bias.dtype), dgate)


TILED = TiledImplementation()

# SPDX-License-Identifier: Apache-2.0
"""Exact attention in tiles, in plain PyTorch: the CPU path, and the fallback on devices that have no kernel.

Forward: online softmax over key tiles. Backward: the weights are computed again from lse, tile by tile. The only
tensors with one element per logit are a few tiles of about `TILE_ELEMENTS`, reused for the whole call, so memory grows
with L.

A tile covers all heads of some rows for one block of queries and one of keys: enough work for torch's batched matmul
to use every thread, small enough to stay in cache between the passes over it. What is added to a whole row or column
of a logit tile rides in extra columns of the operands instead of costing a pass:

    forward   logits = pair + [q s, 1] [k, mask]^T
    backward  log2 P = pair + [q s, 1, -lse] [k, mask, 1]^T,     dP - delta = [do, -delta] [v, 1]^T

Logits are kept in units of log 2 (s = softmax_scale / ln 2): torch's exp2 takes half the time of its exp on a CPU.

Sums are fp32 (fp64 for fp64) and always taken in the same order, so results are bit-identical from run to run.

Axes: B batch, N rows, L attended length (Lq queries, Lk keys), H heads, D head dim. G = b n h: matrices of one group.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .reference import NEG_INF, compute_dtype, row_shift

LOG2_E = math.log2(math.e)
# Elements of one tile. CPU: 1 MiB in fp32, which two cores hold in L2 or L3. Elsewhere: enough to fill the device.
TILE_ELEMENTS = {"cpu": 1 << 18}
TILE_ELEMENTS_ELSEWHERE = 1 << 25
MAX_TILE_KEYS = 512
MIN_TILE_QUERIES = 32
# Finite biases stop here, far from overflow when summed and still zero weight beside any real key.
LOWEST_BIAS = -1e30
# Stands in for the maximum of a row without keys: finite, so that -inf less it is -inf and not NaN.
LOWEST_MAXIMUM = -1e38


def _blocks(length: int, largest: int) -> list[slice]:
    """Even blocks of at most about `largest`, multiples of 8 except the last."""
    count = max(1, math.ceil(length / largest))
    size = min(length, 8 * math.ceil(length / count / 8))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


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
        elements = TILE_ELEMENTS.get(q.device.type, TILE_ELEMENTS_ELSEWHERE)
        keys = _blocks(k.shape[2], MAX_TILE_KEYS)
        per_query = heads * keys[0].stop
        queries = _blocks(q_len, max(MIN_TILE_QUERIES, elements // per_query))
        per_row = per_query * queries[0].stop
        rows_together = min(rows, max(1, elements // per_row))
        batches_together = max(1, elements // (per_row * rows)) if rows_together == rows else 1
        return cls(_blocks_exact(batch, batches_together), _blocks_exact(rows, rows_together), queries, keys)

    def groups(self):
        return ((b, n) for b in self.batches for n in self.rows)


def _blocks_exact(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _fold_shared_batch(tensors: tuple[Tensor, ...], lead: tuple[int, int]) -> tuple[Tensor, ...]:
    """[B, N, ...] -> [1, B*N, ...]: without a pair bias of their own, batch entries are just more rows."""
    return tuple(x.reshape(1, lead[0] * lead[1], *x.shape[2:]) for x in tensors)


def _mask_logits(mask_bias: Tensor | None, lead: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """The mask as [B, N, Lk] logits in units of log 2, less `row_shift`; -inf where dropped."""
    if mask_bias is None:
        return None
    if mask_bias.dtype == torch.bool:
        mask = torch.zeros_like(mask_bias, dtype=dtype).masked_fill_(~mask_bias, NEG_INF)
    else:
        mask = mask_bias.to(dtype)
        dropped = mask == NEG_INF
        mask = (mask - row_shift(mask.amax(dim=-1, keepdim=True))).clamp_(min=LOWEST_BIAS).mul_(LOG2_E)
        mask.masked_fill_(dropped, NEG_INF)
    return mask[:, :, 0, 0].expand(*lead, -1)


class _PairLogits:
    """Tiles [b, 1, H, q, k] of the pair bias as logits in units of log 2, less `row_shift`; -inf where dropped."""

    def __init__(self, pair_bias: Tensor, dtype: torch.dtype):
        self.bias = pair_bias[:, :1]
        self.dtype = dtype
        smallest, largest = torch.aminmax(self.bias, dim=-1, keepdim=True)
        self.shift = row_shift(largest.to(dtype))  # [B, 1, H, Lq, 1]
        # Asking needs the value on the host; other devices pay for the two extra passes instead.
        self.may_be_extreme = self.bias.device.type != "cpu" or smallest.min().item() < LOWEST_BIAS

    def tile(self, b: slice, i: slice, j: slice) -> Tensor:
        b = b if self.bias.shape[0] > 1 else slice(0, 1)
        bias = self.bias[b, :, :, i, j]
        tile = torch.sub(bias.to(self.dtype), self.shift[b, :, :, i])
        if self.may_be_extreme:
            tile = torch.where(bias == NEG_INF, NEG_INF, tile.clamp_(min=LOWEST_BIAS))
        return tile.mul_(LOG2_E)


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


def _scatter(out: Tensor, x: Tensor, scale: float | None = None) -> None:
    """x [G, L, D], times `scale` -> out [b, n, L, H, D]."""
    batch, rows, length, heads, head_dim = out.shape
    if scale is not None:
        x.mul_(scale)
    out.copy_(x.view(batch, rows, heads, length, head_dim).transpose(2, 3))


def _queries_with_columns(scratch: _Scratch, q: Tensor, softmax_scale: float, columns: int) -> Tensor:
    """[q s, 1, ...] as [G, Lq, D + columns]; columns after the first are the caller's."""
    batch, rows, q_len, heads, head_dim = q.shape
    out = scratch.take("q", batch * rows * heads, q_len, head_dim + columns)
    _gather(out, q, softmax_scale * LOG2_E)
    out[..., head_dim] = 1.0
    return out


def _keys_with_columns(scratch: _Scratch, k: Tensor, mask: Tensor | None, columns: int) -> Tensor:
    """[k, mask, ...] as [G, Lk, D + columns]; columns after the first are 1."""
    batch, rows, k_len, heads, head_dim = k.shape
    out = scratch.take("k", batch * rows * heads, k_len, head_dim + columns)
    _gather(out, k)
    column = out.view(batch, rows, heads, k_len, -1)[..., head_dim]
    if mask is None:
        column.zero_()
    else:
        column.copy_(mask.unsqueeze(2))
    out[..., head_dim + 1 :] = 1.0
    return out


def _logit_tile(
    scratch: _Scratch, queries: Tensor, keys: Tensor, pair_tile: Tensor | None, lead: tuple[int, ...]
) -> Tensor:
    """[G, q, k] = pair + queries keys^T; lead: (b, n, H)."""
    logits = scratch.take("logits", queries.shape[0], queries.shape[1], keys.shape[1])
    if pair_tile is None:
        return torch.bmm(queries, keys.transpose(1, 2), out=logits)
    logits.view(*lead, *logits.shape[1:]).copy_(pair_tile)
    return logits.baddbmm_(queries, keys.transpose(1, 2))


@contextmanager
def _true_fp32(device_type: str):
    """No TF32 or bf16 inside fp32 products, whatever the process has allowed for its own."""
    matmul = torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul
    allowed = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = allowed


def _forward_group(scratch, tiling, q, k, v, mask, pair, b, softmax_scale, o, lse):
    """One group of rows: q, k, v, o [b, n, L, H, D], mask [b, n, Lk], lse [b, n, H, Lq]; writes o and lse."""
    batch, rows, _, heads, head_dim = q.shape
    lead, group = (batch, rows, heads), batch * rows * heads
    queries = _queries_with_columns(scratch, q, softmax_scale, 1)
    keys = _keys_with_columns(scratch, k, mask, 1)
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
                total = weights.sub_(maximum).exp2_().sum(dim=-1, keepdim=True)
                torch.bmm(weights, values[:, j], out=acc)
                continue
            torch.maximum(maximum, tile_maximum, out=tile_maximum)
            shrink = maximum.sub_(tile_maximum).exp2_()
            maximum = tile_maximum
            total.mul_(shrink).add_(weights.sub_(maximum).exp2_().sum(dim=-1, keepdim=True))
            acc.mul_(shrink).baddbmm_(weights, values[:, j])
        empty = total == 0
        lse[:, :, :, i] = maximum.add_(total.log2()).masked_fill_(empty, math.inf).view(*lead, length)
        _scatter(o[:, :, i], acc.div_(total.add_(empty)))


class TiledImplementation:
    """The dispatch table's entry for this file; see `_dispatch.Implementation` for the contract."""

    name = "tiled"

    def unsupported_reason(self, problem) -> str | None:
        return None

    def forward(self, q, k, v, mask_bias, pair_bias, softmax_scale):
        dtype = compute_dtype(q.dtype)
        o = q.new_empty(q.shape)
        batch, rows, q_len, heads, _ = q.shape
        lse = q.new_empty((batch, rows, heads, q_len), dtype=dtype)
        lead = (batch, rows)
        mask = _mask_logits(mask_bias, lead, dtype)
        pair = None if pair_bias is None else _PairLogits(pair_bias, dtype)
        o_rows, lse_rows = o, lse
        if pair is None or pair_bias.shape[0] == 1:
            q, k, v, o_rows, lse_rows = _fold_shared_batch((q, k, v, o, lse), lead)
            mask = None if mask is None else mask.reshape(1, batch * rows, -1)
        tiling = _Tiling.of(q, k)
        scratch = _Scratch(q, dtype)
        with _true_fp32(q.device.type):
            for b, n in tiling.groups():
                part = tuple(x[b, n] for x in (q, k, v))
                mask_part = None if mask is None else mask[b, n]
                _forward_group(scratch, tiling, *part, mask_part, pair, b, softmax_scale, o_rows[b, n], lse_rows[b, n])
        return o, lse

    def backward(self, do, q, k, v, mask_bias, pair_bias, o, lse, softmax_scale, wanted):
        dtype = compute_dtype(q.dtype)
        batch, rows = q.shape[:2]
        lead = (batch, rows)
        grads = [q.new_empty(x.shape) if w else None for x, w in zip((q, k, v), wanted[:3], strict=True)]
        mask = _mask_logits(mask_bias, lead, dtype)
        pair = None if pair_bias is None else _PairLogits(pair_bias, dtype)
        dmask = q.new_zeros((batch, rows, k.shape[2]), dtype=dtype) if wanted[3] else None
        dpair = torch.zeros_like(pair_bias, dtype=dtype, memory_format=torch.contiguous_format) if wanted[4] else None
        dmask_rows, grads_rows = dmask, grads
        if pair is None or pair_bias.shape[0] == 1:
            do, q, k, v, o, lse = _fold_shared_batch((do, q, k, v, o, lse), lead)
            mask = None if mask is None else mask.reshape(1, batch * rows, -1)
            dmask_rows = None if dmask is None else dmask.view(1, batch * rows, -1)
            grads_rows = [None if x is None else x.view(1, batch * rows, *x.shape[2:]) for x in grads]
        tiling = _Tiling.of(q, k)
        scratch = _Scratch(q, dtype)
        with _true_fp32(q.device.type):
            for b, n in tiling.groups():
                parts = tuple(x[b, n] for x in (do, q, k, v, o, lse))
                outputs = tuple(None if x is None else x[b, n] for x in (*grads_rows, dmask_rows))
                mask_part = None if mask is None else mask[b, n]
                _backward_group(scratch, tiling, *parts, mask_part, pair, b, softmax_scale, *outputs, dpair)
        if dmask is not None:
            dmask = dmask.view(batch, rows, 1, 1, -1).sum_to_size(mask_bias.shape).to(mask_bias.dtype)
        if dpair is not None:
            dpair = dpair.to(pair_bias.dtype)
        return (*grads, dmask, dpair)


def _accumulate(tiles: dict, scratch: _Scratch, name: str, index: slice, left: Tensor, right: Tensor) -> None:
    """tiles[index] += left right. Each block has its own memory because batched matmul wants a contiguous result."""
    tile = tiles.get(index.start)
    if tile is None:
        tile = scratch.take(f"{name}{index.start}", left.shape[0], left.shape[1], right.shape[2])
        tiles[index.start] = torch.bmm(left, right, out=tile)
    else:
        tile.baddbmm_(left, right)


def _divide_by_row_sum(scratch: _Scratch, do_tile: Tensor, weights: Tensor) -> Tensor:
    """[do, -delta] divided by the sums of whole rows of weights, which are 1 but for the rounding of lse.

    That rounding is the same for all keys of a row and does not average out: without this the fp32 errors of gradients
    are 1.4 times those of eager PyTorch, with it 1.2. Gradients are linear in [do, -delta]; the weights stay.
    """
    total = weights.sum(dim=-1, keepdim=True)
    return torch.div(do_tile, total.add_(total == 0), out=scratch.take("do_tile", *do_tile.shape))


def _backward_group(scratch, tiling, do, q, k, v, o, lse, mask, pair, b, softmax_scale, dq, dk, dv, dmask, dpair):
    """One group, as in `_forward_group`. Writes dq, dk, dv; adds to dmask [b, n, Lk] and dpair. None: unwanted."""
    batch, rows, q_len, heads, head_dim = q.shape
    lead, group = (batch, rows, heads), batch * rows * heads
    queries = _queries_with_columns(scratch, q, softmax_scale, 2)
    torch.neg(lse.reshape(group, q_len), out=queries[..., head_dim + 1])
    keys = _keys_with_columns(scratch, k, mask, 2)
    values = scratch.take("v", group, k.shape[2], head_dim + 1)
    _gather(values, v)
    values[..., head_dim] = 1.0
    douts = scratch.take("do", group, q_len, head_dim + 1)
    _gather(douts, do)
    products = scratch.take("products", group, q_len, head_dim)
    _gather(products, o)
    delta = products.mul_(douts[..., :head_dim]).sum(dim=-1)
    torch.neg(delta, out=douts[..., head_dim])
    need_dlogits = any(x is not None for x in (dq, dk, dmask, dpair))
    dq_tiles, dk_tiles, dv_tiles = {}, {}, {}
    for i in tiling.queries:
        for j in tiling.keys:
            pair_tile = None if pair is None else pair.tile(b, i, j)
            weights = _logit_tile(scratch, queries[:, i], keys[:, j], pair_tile, lead).exp2_()
            do_tile = douts[:, i]
            if len(tiling.keys) == 1:
                do_tile = _divide_by_row_sum(scratch, do_tile, weights)
            if dv is not None:
                _accumulate(dv_tiles, scratch, "dv", j, weights.transpose(1, 2), do_tile[..., :head_dim])
            if not need_dlogits:
                continue
            dlogits = scratch.take("dlogits", *weights.shape)
            torch.bmm(do_tile, values[:, j].transpose(1, 2), out=dlogits)
            dlogits.mul_(weights)
            if dq is not None:
                _accumulate(dq_tiles, scratch, "dq", i, dlogits, keys[:, j, :head_dim])
            if dk is not None:
                _accumulate(dk_tiles, scratch, "dk", j, dlogits.transpose(1, 2), queries[:, i, :head_dim])
            if dmask is not None:
                dmask[:, :, j] += dlogits.sum(dim=1).view(*lead, -1).sum(dim=2)
            if dpair is not None:
                part = dpair[b if dpair.shape[0] > 1 else slice(0, 1), :, :, i, j]
                shared = (1, 2) if dpair.shape[2] == 1 else (1,)
                part += dlogits.view(*lead, *dlogits.shape[1:]).sum(dim=shared, keepdim=True)
    for out, tiles, blocks, scale in (
        (dq, dq_tiles, tiling.queries, softmax_scale),
        (dk, dk_tiles, tiling.keys, 1 / LOG2_E),
        (dv, dv_tiles, tiling.keys, None),
    ):
        if out is not None:
            for block in blocks:
                _scatter(out[:, :, block], tiles[block.start], scale)


TILED = TiledImplementation()

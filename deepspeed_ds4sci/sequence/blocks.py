# SPDX-License-Identifier: Apache-2.0
"""Attention of some query rows to some key rows, forward and backward, as parts of one softmax.

A block is what one ring step computes. Blocks are merged by online softmax in fp32 (fp64 for fp64 inputs), and
computed tile by tile, so that no more than one [tile, tile] piece of the score matrix per head exists at a time.

Axes: B batch, G key/value heads, R query heads per key/value head, Q queries, K keys, D head dim.
"""

from dataclasses import dataclass

import torch

from deepspeed_ds4sci.sequence.scores import Range, ScoreRules

TILE = 1024
"""Rows and columns of the score matrix computed at a time, in tokens: 4 MiB fp32 per head and sample."""


@dataclass
class SoftmaxState:
    """Output and log-sum-exp of the keys seen so far."""

    output: torch.Tensor  # [B, G, R, Q, D] fp32 | fp64, normalised over the keys seen so far
    lse: torch.Tensor  # [B, G, R, Q] natural log; -inf: no key seen

    @classmethod
    def empty(cls, q: torch.Tensor) -> "SoftmaxState":
        """No key seen yet, for q [B, G, R, Q, D]."""
        output = torch.zeros_like(q, dtype=accumulation_dtype(q), memory_format=torch.contiguous_format)
        return cls(output, torch.full_like(output[..., 0], float("-inf")))

    def merge(self, rows: slice, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Adds more keys for some rows: their normalised output [B, G, R, q, D] and log-sum-exp [B, G, R, q]."""
        old_output, old_lse = self.output[..., rows, :], self.lse[..., rows]
        new_lse = torch.logaddexp(old_lse, lse)
        base = new_lse.masked_fill(new_lse == float("-inf"), 0.0)  # -inf - -inf would be NaN
        old_output.mul_(torch.exp(old_lse - base)[..., None]).add_(output * torch.exp(lse - base)[..., None])
        old_lse.copy_(new_lse)


@dataclass(frozen=True)
class BlockKernel:
    """How blocks are computed.

    fused: use a fused kernel of torch for blocks that need no mask, or only the causal one.
    """

    fused: bool

    def forward(self, q, k, v, rules: ScoreRules, queries: tuple[Range, ...], keys: tuple[Range, ...], state) -> None:
        """Merges attention of q [B, G, R, Q, D] to k, v [B, G, K, D] into `state`.

        queries, keys: global positions of the rows of q and of k, as ranges in local order.
        """
        for row, query_range, column, key_range, kind in self._pieces(rules, queries, keys):
            rows = slice(row, row + query_range[1] - query_range[0])
            columns = slice(column, column + key_range[1] - key_range[0])
            piece = q[..., rows, :], k[..., columns, :], v[..., columns, :]
            if kind is not None:
                state.merge(rows, *_fused_forward(*piece, kind == "causal", rules.scale))
            else:
                state.merge(rows, *_tile_forward(*piece, rules, query_range, key_range, row))

    def backward(self, do, q, k, v, o, lse, delta, rules, queries, keys, dq) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds to dq, and returns dk and dv of this block, in the accumulation dtype.

        Args:
            do, q, o: [B, G, R, Q, D] in the dtype of q; lse: [B, G, R, Q] over ALL keys; delta: rowsum(do * o), like
                lse.
            dq: [B, G, R, Q, D] in the accumulation dtype; changed.

        Returns:
            dk, dv: [B, G, K, D].
        """
        dk = torch.zeros_like(k, dtype=dq.dtype, memory_format=torch.contiguous_format)
        dv = torch.zeros_like(dk)
        for row, query_range, column, key_range, kind in self._pieces(rules, queries, keys):
            rows = slice(row, row + query_range[1] - query_range[0])
            columns = slice(column, column + key_range[1] - key_range[0])
            piece = q[..., rows, :], k[..., columns, :], v[..., columns, :]
            if kind is not None:
                parts = _fused_backward(
                    do[..., rows, :], *piece, o[..., rows, :], lse[..., rows], kind == "causal", rules.scale
                )
            else:
                parts = _tile_backward(
                    do[..., rows, :], *piece, lse[..., rows], delta[..., rows], rules, query_range, key_range, row
                )
            dq[..., rows, :] += parts[0]
            dk[..., columns, :] += parts[1]
            dv[..., columns, :] += parts[2]
        return dk, dv

    def _pieces(self, rules, queries, keys):
        """(local row, global query range, local column, global key range, fused kind or None), empty ones left out."""
        for row, query_range in _offsets(queries):
            for column, key_range in _offsets(keys):
                if rules.nothing_kept(query_range, key_range):
                    continue
                kind = rules.fused_kind(query_range, key_range) if self.fused else None
                if kind is not None:
                    yield row, query_range, column, key_range, kind
                    continue
                for tile_row, tile_queries in _offsets(_cut(query_range, TILE)):
                    for tile_column, tile_keys in _offsets(_cut(key_range, TILE)):
                        if not rules.nothing_kept(tile_queries, tile_keys):
                            yield row + tile_row, tile_queries, column + tile_column, tile_keys, None


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _offsets(ranges):
    offset = 0
    for start, stop in ranges:
        yield offset, (start, stop)
        offset += stop - start


def _cut(whole: Range, tile: int) -> list[Range]:
    return [(start, min(start + tile, whole[1])) for start in range(whole[0], whole[1], tile)]


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b for [B, G, M, N] operands, accumulated and returned in fp32 (fp64) whatever the inputs' dtype."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)  # tensor cores
        return product.unflatten(0, a.shape[:2])
    dtype = accumulation_dtype(a)
    return a.to(dtype) @ b.to(dtype)


def _tile_scores(q, k, rules, queries, keys, row):
    """Scaled and masked scores [B, G, R, q, k]."""
    batch, groups, repeat = q.shape[:3]
    scores = _matmul(q.flatten(2, 3), k.mT).mul_(rules.scale)  # [B, G, R * q, k]
    scores = scores.view(batch, groups * repeat, q.shape[3], k.shape[2])
    return rules.apply(scores, queries, keys, row).view(batch, groups, repeat, q.shape[3], k.shape[2])


def _dropout_factor(scores, rules, queries, keys):
    return rules.dropout_factor(scores.flatten(1, 2), queries, keys).view_as(scores)


def _tile_forward(q, k, v, rules, queries, keys, row):
    scores = _tile_scores(q, k, rules, queries, keys, row)
    highest = scores.amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weights = (scores - highest).exp_()
    total = weights.sum(-1)  # [B, G, R, q]
    lse = highest.squeeze(-1) + total.log()
    weights /= total.masked_fill(total == 0, 1.0)[..., None]
    if rules.dropout_p:
        weights *= _dropout_factor(weights, rules, queries, keys)
    output = _matmul(weights.flatten(2, 3).to(q.dtype), v).view_as(q)
    return output, lse


def _tile_backward(do, q, k, v, lse, delta, rules, queries, keys, row):
    scores = _tile_scores(q, k, rules, queries, keys, row)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))  # a row without keys: all its weights are 0
    weights = (scores - lse[..., None]).exp_()
    do_rows, q_rows = do.flatten(2, 3), q.flatten(2, 3)  # [B, G, R * q, D]
    dweights = _matmul(do_rows, v.mT).view_as(weights)
    dropped = weights
    if rules.dropout_p:
        factor = _dropout_factor(weights, rules, queries, keys)
        dropped = weights * factor
        dweights *= factor
    dv = _matmul(dropped.flatten(2, 3).mT.to(q.dtype), do_rows)
    dscores = dweights.sub_(delta[..., None]).mul_(weights).mul_(rules.scale).flatten(2, 3).to(q.dtype)
    return _matmul(dscores, k).view_as(q), _matmul(dscores.mT, q_rows), dv


def _fused_operands(q, k, v):
    """[B, G * R, rows, D padded to a multiple of 8] each: what torch's fused kernels take."""
    repeat, short = q.shape[2], -q.shape[-1] % 8
    operands = q.flatten(1, 2), k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    return [torch.nn.functional.pad(x, (0, short)) if short else x.contiguous() for x in operands]


def _fused_forward(q, k, v, causal, scale):
    operands = _fused_operands(q, k, v)
    op = torch.ops.aten
    if q.is_cuda:
        output, lse = op._scaled_dot_product_flash_attention(*operands, 0.0, causal, scale=scale)[:2]
    else:
        output, lse = op._scaled_dot_product_flash_attention_for_cpu(*operands, 0.0, causal, scale=scale)
    output = output[..., : q.shape[-1]].to(accumulation_dtype(q))
    return output.reshape(q.shape), lse.reshape(q.shape[:-1]).to(output.dtype)


def _fused_backward(do, q, k, v, o, lse, causal, scale):
    batch, groups, repeat, _, head_dim = q.shape
    operands = _fused_operands(q, k, v)
    do, o = (torch.nn.functional.pad(x.flatten(1, 2), (0, -head_dim % 8)).contiguous() for x in (do, o))
    lse, rows, columns = lse.flatten(1, 2), q.shape[-2], k.shape[-2]
    op = torch.ops.aten
    if q.is_cuda:
        # No dropout: the random state is not read. Fixed lengths: neither are the cumulative ones.
        empty = torch.empty(0, dtype=torch.int64, device=q.device)
        grads = op._scaled_dot_product_flash_attention_backward(
            do, *operands, o, lse.contiguous(), None, None, rows, columns, 0.0, causal, empty, empty, scale=scale
        )
    else:
        grads = op._scaled_dot_product_flash_attention_for_cpu_backward(
            do, *operands, o, lse.contiguous(), 0.0, causal, scale=scale
        )
    dq, dk, dv = (grad[..., :head_dim].to(accumulation_dtype(q)) for grad in grads)
    dk, dv = (grad.reshape(batch, groups, repeat, columns, head_dim).sum(2) for grad in (dk, dv))
    return dq.reshape(q.shape), dk, dv

# SPDX-License-Identifier: Apache-2.0
"""What happens to attention scores between q k^T and the softmax, by global position.

Every implementation of attention here takes its masks and biases from one `ScoreRules`, so a rank that holds any rows
and any columns of the score matrix applies what one rank would apply to the same elements.

Axes: B batch, H query heads held here, Q queries, K keys, S tokens of the whole sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch, head, query, key) index tensors that broadcast against each other -> bool, True = keep. Heads and positions
are global. The form that `torch.nn.attention.flex_attention` calls `mask_mod`."""

Range = tuple[int, int]  # global positions [start, stop)

DOCUMENT_BLOCK = 128
"""Tokens for which document ids are summed up as a lowest and a highest one, to skip tiles without common ids."""

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as int64


@dataclass(frozen=True)
class ScoreRules:
    """Masks, biases and dropout of one attention call, for the heads and query rows that this rank works on.

    A key is kept for a query if all of these allow it. A query with no key at all gives 0.
    """

    scale: float
    left: int | None = None
    """Keys at most this many tokens before the query; None: no limit."""
    right: int | None = None
    """Keys at most this many tokens after the query; 0: causal; None: no limit."""
    slopes: torch.Tensor | None = None
    """[H] fp32, ALiBi: -slope * |query - key| is added to the scaled score."""
    documents: torch.Tensor | None = None
    """[B, S] int64: only tokens of the same id see each other; a negative id is padding, which sees and is seen by
    nothing."""
    mask: torch.Tensor | None = None
    """[B|1, H|1, rows|1, S]: bool (True = keep) or a float bias; rows are this rank's queries in local order."""
    mask_rule: MaskRule | None = None
    first_head: int = 0
    """Global number of the first head held here."""
    num_heads: int | None = None
    """Heads in all. `mask_rule` is asked with the last one's number for heads that only pad."""
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None
    """0-d int64, the same on all ranks that share the sequence."""

    def only_causal_or_nothing(self) -> bool:
        """True if attention is plain but for causality, which fused kernels do by themselves."""
        return self.left is None and self.right in (None, 0) and self._only_positions() and self.dropout_p == 0

    def _only_positions(self) -> bool:
        return all(rule is None for rule in (self.slopes, self.documents, self.mask, self.mask_rule))

    def nothing_kept(self, queries: Range, keys: Range) -> bool:
        """True if it is cheap to see that window, causality or documents leave no key of `keys` to any query."""
        after = self.right is not None and keys[0] - (queries[1] - 1) > self.right
        before = self.left is not None and queries[0] - (keys[1] - 1) > self.left
        return after or before or (self.documents is not None and self._documents_apart(queries, keys))

    def _documents_apart(self, queries: Range, keys: Range) -> bool:
        """True if in every sample the ids around the queries are all below, or all above, those around the keys."""
        for lowest, highest in self._document_bounds:
            (q_low, q_high), (k_low, k_high) = (
                (min(lowest[blocks]), max(highest[blocks])) for blocks in map(_blocks, (queries, keys))
            )
            if q_low <= k_high and k_low <= q_high:
                return False
        return True

    @cached_property
    def _document_bounds(self) -> list[tuple[list[int], list[int]]]:
        """For each sample the lowest and the highest id of each block of tokens, on the host: one transfer a call."""
        short = -self.documents.shape[1] % DOCUMENT_BLOCK
        ids = torch.cat([self.documents, self.documents[:, -1:].expand(-1, short)], 1)
        bounds = torch.stack(ids.unflatten(1, (-1, DOCUMENT_BLOCK)).aminmax(dim=-1))  # [2, B, blocks]
        return list(zip(*bounds.tolist(), strict=True))

    def everything_kept(self, queries: Range, keys: Range) -> bool:
        """True if window and causality leave every key of `keys` to every query of `queries`."""
        right = self.right is None or keys[1] - 1 - queries[0] <= self.right
        left = self.left is None or queries[1] - 1 - keys[0] <= self.left
        return right and left

    def fused_kind(self, queries: Range, keys: Range) -> str | None:
        """ "full" or "causal" where a plain fused kernel computes this block exactly, else None."""
        if not self._only_positions() or self.dropout_p:
            return None
        if self.everything_kept(queries, keys):
            return "full"
        return "causal" if queries == keys and self.left is None and self.right == 0 else None

    def apply(self, scores: torch.Tensor, queries: Range, keys: Range, row: int) -> torch.Tensor:
        """Adds the biases to scaled scores and sets removed elements to -inf.

        Args:
            scores: [B, H, Q, K] fp32 or fp64, scaled. May be changed.
            queries, keys: global positions of its rows and columns.
            row: local number of the first query, for `mask`.
        """
        keep = self.kept(scores.shape, queries, keys, scores.device)
        if self.slopes is not None:
            query, key = _columns_and_rows(queries, keys, scores.device)
            scores = scores - self.slopes.to(scores.dtype)[:, None, None] * (query - key).abs().to(scores.dtype)
        if self.mask is not None:
            rows = slice(None) if self.mask.shape[2] == 1 else slice(row, row + queries[1] - queries[0])
            mask = self.mask[:, :, rows, keys[0] : keys[1]]
            if mask.dtype == torch.bool:
                keep = _both(keep, mask)
            else:
                scores = scores + mask.to(scores.dtype)
        return scores if keep is None else scores.masked_fill_(~keep, float("-inf"))

    def kept(self, shape: tuple[int, ...], queries: Range, keys: Range, device) -> torch.Tensor | None:
        """What all but `mask` keeps of scores [B, H, Q, K]: bool that broadcasts to them; None: everything."""
        query, key = _columns_and_rows(queries, keys, device)
        keep = None
        if not self.everything_kept(queries, keys):
            keep = _within(query - key, self.left, self.right)
        if self.documents is not None:
            of_query = self.documents[:, None, queries[0] : queries[1], None]
            of_key = self.documents[:, None, None, keys[0] : keys[1]]
            keep = _both(keep, (of_query == of_key) & (of_query >= 0))
        if self.mask_rule is not None:
            batch, head = self._batch_and_head(shape, device)
            keep = _both(keep, self.mask_rule(batch, self.real_head(head), query, key))
        return keep

    def dropout_factor(self, scores: torch.Tensor, queries: Range, keys: Range) -> torch.Tensor:
        """What probabilities are multiplied with: 0 or 1 / (1 - dropout_p), like `scores`.

        A hash of seed, batch, head, query and key decides, so forward, backward and recomputation agree, and so do
        all ways of cutting the score matrix: P ranks drop exactly what one rank drops.
        """
        query, key = _columns_and_rows(queries, keys, scores.device)
        batch, head = self._batch_and_head(scores.shape, scores.device)
        rows = _mix(_mix(_mix(self.dropout_seed + batch * _GOLDEN) + head * _GOLDEN) + query * _GOLDEN)
        uniform = _mix(rows + key * _GOLDEN) & 0xFFFFFF  # 24 bits
        keep = uniform >= round(self.dropout_p * 2**24)
        return keep.to(scores.dtype).div_(1 - self.dropout_p)

    def real_head(self, head: torch.Tensor) -> torch.Tensor:
        """Head numbers that a user's rule may be asked with."""
        return head if self.num_heads is None else head.clamp(max=self.num_heads - 1)

    def _batch_and_head(self, shape, device):
        batch = torch.arange(shape[0], device=device).view(-1, 1, 1, 1)
        head = torch.arange(self.first_head, self.first_head + shape[1], device=device)
        return batch, head.view(1, -1, 1, 1)

    def bias(self, like: torch.Tensor, queries: tuple[Range, ...], keys: Range) -> torch.Tensor:
        """All biases and masks as one explicit float tensor [B|1, H|1, Q, K] for the rows of several ranges. One for
        all samples or heads where they do not differ.

        Args:
            like: any tensor whose batch, heads, dtype and device are taken: [B, H, ...].
        """
        parts, row = [], 0
        given = [self.mask.shape[:2]] if self.mask is not None else []
        samples = self.mask_rule is not None or self.documents is not None or any(size[0] > 1 for size in given)
        heads = self.mask_rule is not None or self.slopes is not None or any(size[1] > 1 for size in given)
        sizes = like.shape[0] if samples else 1, like.shape[1] if heads else 1
        for start, stop in queries:
            shape = (*sizes, stop - start, keys[1] - keys[0])
            parts.append(self.apply(like.new_zeros(shape), (start, stop), keys, row))
            row += stop - start
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def for_heads(self, first: int, stop: int) -> "ScoreRules":
        """The rules of heads [first, stop) of those held here; heads past the end are padding and have no bias."""

        def select(tensor, axis):
            if tensor is None or tensor.shape[axis] == 1 and axis == 1:
                return tensor
            kept = tensor
            if self.num_heads in (None, tensor.shape[axis]):  # else they have been selected
                begin = min(first, tensor.shape[axis])
                kept = tensor.narrow(axis, begin, max(min(stop, tensor.shape[axis]) - begin, 0))
            missing = stop - first - kept.shape[axis]
            if not missing:
                return kept
            shape = list(tensor.shape)
            shape[axis] = missing
            return torch.cat([kept, tensor.new_zeros(shape)], axis)

        return replace(
            self, slopes=select(self.slopes, 0), mask=select(self.mask, 1), first_head=self.first_head + first
        )


def window_limits(causal: bool, window: int | tuple[int, int] | None) -> tuple[int | None, int | None]:
    """(left, right) limits in tokens from what users write.

    Args:
        causal: no key after the query.
        window: None; or w: the query and the w - 1 tokens before it, and after it unless causal (the count of
            Mistral's `sliding_window`); or (left, right) tokens beside the query, -1 for no limit (FlashAttention's).

    Raises:
        ValueError: a window that holds nothing, or a pair that is not one.
    """
    left = right = None
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1:
            raise ValueError(f"window must be at least 1 token, got {window}")
        left = right = window - 1
    elif window is not None:
        if len(window) != 2 or any(side < -1 for side in window):
            raise ValueError(f"window must be a number of tokens or (left, right) with -1 for no limit, got {window}")
        left, right = (None if side == -1 else side for side in window)
    return left, 0 if causal else right


def _columns_and_rows(queries: Range, keys: Range, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the queries [Q, 1] and of the keys [1, K]."""
    return torch.arange(*queries, device=device)[:, None], torch.arange(*keys, device=device)[None, :]


def _blocks(tokens: Range) -> slice:
    return slice(tokens[0] // DOCUMENT_BLOCK, -(-tokens[1] // DOCUMENT_BLOCK))


def _within(offset: torch.Tensor, left: int | None, right: int | None) -> torch.Tensor:
    keep = torch.ones_like(offset, dtype=torch.bool)
    if left is not None:
        keep &= offset <= left
    if right is not None:
        keep &= offset >= -right
    return keep


def _both(one: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if one is None else one & other


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 in wrapping int64 arithmetic. Source: Steele, Lea, Flood 2014."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)

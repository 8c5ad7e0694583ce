# SPDX-License-Identifier: Apache-2.0
"""Exact attention when each rank holds a part of the sequence.

Axes: B batch, S tokens of the whole sequence, L tokens held by this rank, H query heads, G key/value heads, D head
dim.
"""

from functools import lru_cache

import torch
import torch.distributed as dist

from deepspeed_ds4sci.sequence import ulysses
from deepspeed_ds4sci.sequence.blocks import BlockKernel
from deepspeed_ds4sci.sequence.layout import Layout, Mode, length_multiple, split_mode
from deepspeed_ds4sci.sequence.local_attention import IMPLEMENTATIONS, local_attention, unsupported_reason
from deepspeed_ds4sci.sequence.ring import ring_attention
from deepspeed_ds4sci.sequence.scores import MaskRule, ScoreRules, window_limits

_FUSED_RING_DTYPES = (torch.float16, torch.bfloat16)  # what FlashAttention-2 takes on a GPU
_FUSED_RING_HEAD_DIM = 256


class SequenceParallelAttention:
    """Attention over the whole sequence from the tokens that each rank of a group holds. Without a group: plain.

    The result, and every gradient, is that of one rank holding everything, for any mode. Who holds what is
    `Layout(S, size, mode)`. All ranks of the group must call it in the same order.

    Args:
        group: ranks that share one sequence, in order; None: this rank alone.
        mode: "ulysses", "ring", or {"ulysses": a, "ring": b} with a * b = ranks.
        implementation: a name of `local_attention.IMPLEMENTATIONS`. With a ring: "auto", "tiled", or "flash", which
            uses the fused kernel for blocks that need no mask beyond causality and tiles for the others ("auto" does
            so on a GPU in 16 bits).
        ulysses_group, ring_group: the parts of `group` that this rank is in, if they exist already; else they are
            created here, by all ranks of `group` together.

    Raises:
        ValueError: a mode that does not fit the group, or an unknown implementation.
        NotImplementedError: an implementation that does not work in a ring.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        mode: Mode = "ulysses",
        *,
        implementation: str = "auto",
        ulysses_group: dist.ProcessGroup | None = None,
        ring_group: dist.ProcessGroup | None = None,
    ):
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
        self.group, self.mode, self.implementation = group, mode, implementation
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        by_heads, in_ring = split_mode(self.size, mode)
        if in_ring > 1 and implementation not in ("auto", "tiled", "flash"):
            raise NotImplementedError(
                f'a ring works with "auto", "tiled" or "flash" attention, got "{implementation}"'
            )
        if by_heads > 1 and in_ring > 1 and (ulysses_group is None or ring_group is None):
            ulysses_group, ring_group = _subgroups(group, by_heads)
        self._ulysses_group = (ulysses_group or group) if by_heads > 1 else None
        self._ring_group = (ring_group or group) if in_ring > 1 else None

    def __deepcopy__(self, memo):
        """A copy of a model attends in the same process groups; nothing here changes."""
        return self

    @property
    def multiple(self) -> int:
        """Tokens of which S must be a multiple."""
        return length_multiple(self.size, self.mode)

    @property
    def skips_tiles(self) -> bool:
        """Whether attention under a mask is by tiles: those that causality, window or documents empty are left out."""
        return self.implementation in ("auto", "tiled")

    def layout(self, local_len: int) -> Layout:
        """Who holds what when each rank holds `local_len` tokens."""
        return Layout(local_len * self.size, self.size, self.mode)

    def positions(self, local_len: int, device: torch.device | str | None = None) -> torch.Tensor:
        """[L] int64: global positions of this rank's tokens."""
        return self.layout(local_len).positions(self.rank, device)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool = True,
        mask: torch.Tensor | MaskRule | None = None,
        alibi_slopes: torch.Tensor | None = None,
        window: int | tuple[int, int] | None = None,
        document_ids: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        """softmax(scale * q k^T + biases) v over all S keys, for this rank's L queries.

        Args:
            q: [B, L, H, D]; k, v: [B, L, G, D], H a multiple of G; same dtype and device.
            causal: no key after the query, by global position.
            mask: [B|1, H|1, rows, S], bool (True = keep) or a float bias, without gradient; rows is 1 (a mask of
                keys), L (this rank's queries), the queries that this rank works on (`Layout.attention_positions`), or
                S; the heads may be those that this rank works on alone (`ulysses.own_heads`). Or a function
                (batch, head, query, key) -> bool of global index tensors.
            alibi_slopes: [H]; -slope * |query - key| is added to the scaled scores. No gradient.
            window: see `scores.window_limits`.
            document_ids: [B, L] int64, this rank's, or [B, S]; tokens see only their own document. A negative id is
                padding: it sees and is seen by nothing, and its output is 0.
            dropout_p: probability of dropping a weight. What is dropped depends on the seed drawn by the group's first
                rank and on global positions, not on the mode or the number of ranks.
            scale: default D ** -0.5.

        Returns:
            [B, L, H, D], dtype of q. 0 for a query without any key.

        Raises:
            ValueError: shapes, dtypes or lengths that do not match; the message gives argument, expected, got.
            NotImplementedError: a mask or slopes that require a gradient; an implementation that cannot do this.
        """
        _check(q, k, v, alibi_slopes, dropout_p)
        batch, local_len, heads, head_dim = q.shape
        layout = self.layout(local_len)
        left, right = window_limits(causal, window)
        is_rule = mask is not None and not isinstance(mask, torch.Tensor)
        rules = ScoreRules(
            scale=head_dim**-0.5 if scale is None else scale,
            left=left,
            right=right,
            slopes=None if alibi_slopes is None else alibi_slopes.to(q.device),
            documents=None if document_ids is None else self._all_documents(document_ids, layout, batch),
            mask=None if mask is None or is_rule else self._working_rows(mask, layout, batch, heads),
            mask_rule=mask if is_rule else None,
            num_heads=heads,
            dropout_p=dropout_p,
            dropout_seed=self._shared_seed(q.device) if dropout_p else None,
        )
        if layout.ulysses > 1:
            q, k, v = ulysses.tokens_for_heads(q, k, v, self._ulysses_group)
            first = layout.ulysses_rank(self.rank) * q.shape[2]
            rules = rules.for_heads(first, first + q.shape[2])
        if layout.ring > 1:
            reason = self.implementation == "flash" and unsupported_reason("flash", rules)
            if reason:
                raise NotImplementedError(f"attention implementation {reason}")
            ranges = [layout.attention_ranges(rank) for rank in range(0, self.size, layout.ulysses)]
            output = ring_attention(q, k, v, rules, ranges, self._ring_group, BlockKernel(self._fused_blocks(q)))
        else:
            output = local_attention(q, k, v, rules, self.implementation)
        return ulysses.heads_for_tokens(output, heads, self._ulysses_group) if layout.ulysses > 1 else output

    def _fused_blocks(self, q: torch.Tensor) -> bool:
        on_gpu = q.is_cuda and q.dtype in _FUSED_RING_DTYPES and q.shape[-1] <= _FUSED_RING_HEAD_DIM
        if self.implementation == "flash" and q.is_cuda and not on_gpu:
            raise NotImplementedError(
                f'attention implementation "flash" takes fp16 or bf16 and a head dim of at most '
                f"{_FUSED_RING_HEAD_DIM}, got {q.dtype} and {q.shape[-1]}"
            )
        return self.implementation == "flash" or (self.implementation == "auto" and on_gpu)

    def _all_documents(self, document_ids, layout, batch):
        """[B, S] ids in global order."""
        if document_ids.shape == (batch, layout.seq_len):
            return document_ids
        if document_ids.shape != (batch, layout.local_len):
            raise ValueError(
                f"document_ids must be [B, L] = {[batch, layout.local_len]} or [B, S] = {[batch, layout.seq_len]}, "
                f"got {list(document_ids.shape)}"
            )
        return layout.unshard(_gathered(document_ids, self.group), 1)

    def _working_rows(self, mask, layout, batch, heads):
        """The mask's rows for the queries that this rank works on, in its order."""
        if mask.requires_grad:
            raise NotImplementedError("mask requires a gradient; a learned bias is not supported")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"mask must be bool (True = keep) or a float bias, got {mask.dtype}")
        working_len = layout.seq_len // layout.ring
        rows = (1, layout.local_len, working_len, layout.seq_len)
        shape = tuple(mask.shape)
        first, stop = ulysses.own_heads(heads, layout.ulysses, layout.ulysses_rank(self.rank))
        some_heads = (1, stop - first, heads)
        fits = len(shape) == 4 and shape[0] in (1, batch) and shape[1] in some_heads and shape[3] == layout.seq_len
        if not fits or shape[2] not in rows:
            raise ValueError(
                f"mask must be [B|1, H|1, rows, S] = [{batch}|1, {heads}|1, {'|'.join(map(str, sorted(set(rows))))}, "
                f"{layout.seq_len}], got {list(shape)}"
            )
        if shape[2] in (1, working_len):
            return mask
        if shape[2] == layout.seq_len:
            return torch.cat([mask[:, :, start:stop] for start, stop in layout.attention_ranges(self.rank)], 2)
        is_bool = mask.dtype == torch.bool
        pieces = _gathered(mask.to(torch.uint8) if is_bool else mask, self._ulysses_group)
        return torch.cat(pieces, 2).to(mask.dtype)

    def _shared_seed(self, device):
        """The first rank's draw from the device's generator, which recomputation repeats."""
        seed = torch.randint(2**62, (), device=device)
        if self.group is not None:
            dist.broadcast(seed, dist.get_global_rank(self.group, 0), self.group)
        return seed


def _check(q, k, v, alibi_slopes, dropout_p):
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q must be [B, L, H, D] and k, v [B, L, G, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {q.shape[2]} and {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if alibi_slopes is None:
        return
    if alibi_slopes.shape != (q.shape[2],):
        raise ValueError(f"alibi_slopes must be [H] = [{q.shape[2]}], got {list(alibi_slopes.shape)}")
    if alibi_slopes.requires_grad:
        raise NotImplementedError("alibi_slopes require a gradient; learned slopes are not supported")


def _gathered(tensor: torch.Tensor, group) -> list[torch.Tensor]:
    if group is None:
        return [tensor]
    tensor = tensor.contiguous()
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(pieces, tensor, group=group)
    return pieces


@lru_cache
def _subgroups(group, by_heads):
    """This rank's Ulysses group and ring. Created once per group: every layer's attention shares them."""
    ranks, me = dist.get_process_group_ranks(group), dist.get_rank(group)
    first = me - me % by_heads
    grid = (ranks[first : first + by_heads], ranks[me % by_heads :: by_heads])
    return tuple(dist.new_group(members, use_local_synchronization=True) for members in grid)

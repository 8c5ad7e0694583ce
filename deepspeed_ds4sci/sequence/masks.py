# SPDX-License-Identifier: Apache-2.0
"""Explicit attention masks, built where they fit.

A mask of S tokens has S^2 elements, and building it the plain way needs at least twice that. Up to a threshold it is
built on the device; above, in CPU memory with all operations there and one transfer at the end. On either side only
the wanted rows are formed, one block of rows at a time, so the temporaries are those of a block.

Axes: B batch, H heads, Q wanted rows, S tokens of the whole sequence.
"""

from dataclasses import dataclass

import torch

from deepspeed_ds4sci.sequence.scores import MaskRule, Range, ScoreRules, window_limits

CPU_THRESHOLD = 16384  # tokens; found by the method's authors for a 40 GB A100
BLOCK_ROWS = 512
"""Rows formed at a time: temporaries are this many times S times 9 bytes (int64 distance and bool), per head."""


@dataclass(frozen=True)
class MaskFactory:
    """Builds masks for `SequenceParallelAttention(mask=...)` or torch's SDPA.

    Args:
        device: where the mask is wanted.
        cpu_threshold: tokens; a longer sequence's mask is built in CPU memory.
        dtype: torch.bool (True = keep), or a float dtype for 0 and -inf.

    Raises:
        ValueError: a threshold below 1, or a dtype that is neither.
    """

    device: torch.device | str = "cpu"
    cpu_threshold: int = CPU_THRESHOLD
    dtype: torch.dtype = torch.bool

    def __post_init__(self):
        if self.cpu_threshold < 1:
            raise ValueError(f"cpu_threshold must be at least 1 token, got {self.cpu_threshold}")
        if self.dtype != torch.bool and not self.dtype.is_floating_point:
            raise ValueError(f"dtype must be torch.bool or a float dtype, got {self.dtype}")

    def build_device(self, seq_len: int) -> torch.device:
        """Where the mask of a sequence of this many tokens is built."""
        return torch.device("cpu") if seq_len > self.cpu_threshold else torch.device(self.device)

    def __call__(
        self,
        seq_len: int,
        rows: tuple[Range, ...] | None = None,
        *,
        causal: bool = True,
        window: int | tuple[int, int] | None = None,
        document_ids: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        custom: torch.Tensor | MaskRule | None = None,
        heads: Range = (0, 1),
        num_samples: int = 1,
    ) -> torch.Tensor:
        """The rows of a mask that one rank needs.

        Args:
            seq_len: S, tokens of the whole sequence.
            rows: global [start, stop) ranges of the wanted rows, in order, such as `Layout.attention_ranges(rank)`
                (what attention works on) or `Layout.ranges(rank)`; None: all.
            causal, window: see `scores.window_limits`.
            document_ids: [B, S] int64, see `SequenceParallelAttention`; a negative id is padding.
            padding_mask: [B, S] bool or 0/1, True = a token: padding sees and is seen by nothing.
            custom: [B|1, H|1, S, S] or [B|1, H|1, Q, S], bool (True = keep) or, for a float factory, a float bias; or
                a function (batch, head, query, key) -> bool of global index tensors, on the device where masks are
                built. A square one may be smaller than S: what lies beyond it is padding.
            heads: global numbers [first, stop) of the heads that a function is asked for; one when it does not look at
                them. num_samples: the same for samples.

        Returns:
            [B|1, H|1, Q, S] on `device`. All conditions hold at once for a kept element.

        Raises:
            ValueError: shapes that do not match, ranges outside of the sequence, a float bias for a bool mask.
        """
        rows = ((0, seq_len),) if rows is None else tuple(rows)
        if any(not 0 <= start < stop <= seq_len for start, stop in rows):
            raise ValueError(f"rows must be ranges within [0, {seq_len}), got {rows}")
        device = self.build_device(seq_len)
        left, right = window_limits(causal, window)
        is_rule = custom is not None and not isinstance(custom, torch.Tensor)
        rules = ScoreRules(
            scale=1.0,
            left=left,
            right=right,
            documents=_documents(document_ids, padding_mask, seq_len, device),
            mask_rule=custom if is_rule else None,
            first_head=heads[0],
        )
        tensor = None if custom is None or is_rule else self._checked_custom(custom, rows, seq_len)
        num_rows = sum(stop - start for start, stop in rows)
        batches = [num_samples, *(x.shape[0] for x in (rules.documents, tensor) if x is not None)]
        num_heads = heads[1] - heads[0] if is_rule else 1 if tensor is None else tensor.shape[1]
        mask = torch.empty(max(batches), num_heads, num_rows, seq_len, dtype=self.dtype, device=device)
        row = 0
        for start, stop in rows:
            for first in range(start, stop, BLOCK_ROWS):
                last = min(first + BLOCK_ROWS, stop)
                block = mask[:, :, row : row + last - first]
                given = None if tensor is None else _rows_of(tensor, block, row, first)
                self._fill(block, rules, (first, last), given)
                row += last - first
        return mask.to(self.device)

    def _fill(self, block, rules, queries, custom):
        """Writes one block of rows in place."""
        keep = rules.kept(block.shape, queries, (0, block.shape[-1]), block.device)
        if custom is not None and custom.dtype == torch.bool:
            keep = custom if keep is None else keep & custom
        if self.dtype == torch.bool:
            block.fill_(True) if keep is None else block.copy_(keep.expand_as(block))
            return
        block.zero_() if custom is None or custom.dtype == torch.bool else block.copy_(custom.expand_as(block))
        if keep is not None:
            block.masked_fill_(~keep, float("-inf"))

    def _checked_custom(self, custom, rows, seq_len):
        num_rows = sum(stop - start for start, stop in rows)
        square = custom.dim() == 4 and custom.shape[2] == custom.shape[3] <= seq_len
        fits = custom.dim() == 4 and custom.shape[3] == seq_len and custom.shape[2] in (1, num_rows)
        if not (square or fits):
            raise ValueError(
                f"custom must be [B|1, H|1, {seq_len} or {num_rows} rows, {seq_len}], got {list(custom.shape)}"
            )
        if custom.dtype != torch.bool and (self.dtype == torch.bool or not custom.is_floating_point()):
            raise ValueError(f"custom must be bool for a mask of {self.dtype}, got {custom.dtype}")
        return custom


def within(rule: MaskRule, seq_len: int) -> MaskRule:
    """`rule` for sequences that are padded on the right: about padding it is asked as about the last token.

    It knows the positions of its own sequence, and may index tables with them.
    """

    def bounded(batch, head, query, key):
        return rule(batch, head, query.clamp(max=seq_len - 1), key.clamp(max=seq_len - 1))

    return bounded


def _rows_of(tensor, block, row, first):
    """The block's rows of a custom mask that is square, or holds the wanted rows, or one row for all."""
    num_rows, num_columns = tensor.shape[2:]
    if num_rows == 1:
        return tensor.to(block.device)
    begin = first if num_rows == num_columns else row
    given = tensor[:, :, begin : begin + block.shape[2]].to(block.device)
    missing = block.shape[2] - given.shape[2], block.shape[3] - num_columns
    if not any(missing):
        return given
    closed = False if tensor.dtype == torch.bool else float("-inf")
    return torch.nn.functional.pad(given, (0, missing[1], 0, missing[0]), value=closed)


def _documents(document_ids, padding_mask, seq_len, device):
    """[B, S] ids with padding as -1, or None."""
    for name, given in (("document_ids", document_ids), ("padding_mask", padding_mask)):
        if given is not None and (given.dim() != 2 or given.shape[1] != seq_len):
            raise ValueError(f"{name} must be [B, S] with S = {seq_len}, got {list(given.shape)}")
    if padding_mask is None:
        return None if document_ids is None else document_ids.to(device)
    padding = ~padding_mask.to(device).bool()
    documents = torch.zeros_like(padding, dtype=torch.int64) if document_ids is None else document_ids.to(device)
    return documents.masked_fill(padding, -1)

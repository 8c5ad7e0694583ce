# SPDX-License-Identifier: Apache-2.0
"""From the whole batch that every rank of a sequence group has to the part that this rank works on."""

import zlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F

from deepspeed_ds4sci.sequence.layout import Layout, Mode, length_multiple, padded_length
from deepspeed_ds4sci.sequence.loss import IGNORE_INDEX, shift_labels

_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "x")  # of which a batch has one
_CHECKED_AT_ONCE = 2**22  # elements whose checksum is formed at a time: 96 MiB of temporaries


@dataclass(frozen=True)
class ShardedBatch:
    """What attention, the loss and the outputs need to know about the batch in work.

    labels: [B, L] int64 or None, shifted if the model predicts the next token.
    key_mask: [B, 1, 1, S] bool or None, True = attended to.
    mask: [B|1, H|1, L, S] bool or float or None: a mask of the script's own, the rows of this rank.
    document_ids: [B, S] int64 or None: tokens see their own document only.
    positions: [B|1, L] int64 or None: the position of each of this rank's tokens in its sequence.
    built: `mask` was built for this batch by the rows that attention works on, and says everything about who sees
        whom.
    limits: what attention that works by tiles needs to know of a built mask: its arguments causal, window and
        document_ids, as far as the mask contains them.
    """

    layout: Layout
    seq_len: int
    batch_size: int
    labels: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    built: bool = False
    limits: dict = field(default_factory=dict)

    def attention_mask(self):
        """The two masks as one; None if there is none."""
        if self.mask is None or self.key_mask is None:
            return self.key_mask if self.mask is None else self.mask
        if self.mask.dtype == torch.bool:
            return self.mask & self.key_mask
        return self.mask.masked_fill(~self.key_mask, float("-inf"))


@dataclass(frozen=True)
class InputSharder:
    """Shards batches for one rank of a sequence group.

    Args:
        size, mode, rank: the group, see `Layout`, and this rank's place in it.
        padding: "pad" or "refuse", for lengths that cannot be cut evenly.
        causal: the model's attention is causal and its labels are the next tokens.
        pad_token_id: what is filled in on the right.
    """

    size: int
    mode: Mode
    rank: int
    padding: str
    causal: bool
    pad_token_id: int = 0

    def shard(self, arguments: dict, packed: bool = False) -> tuple[dict, ShardedBatch]:
        """This rank's arguments for the model, and what goes with them.

        Args:
            arguments: of the model's forward: input_ids [B, S] or inputs_embeds [B, S, d], and any of labels [B, S],
                shift_labels [B, S], position_ids [B|1, S], token_type_ids [B, S], attention_mask [B, S] or
                [B|1, H|1, S, S].
            packed: position ids that start again begin a new document.

        Raises:
            ValueError: a length that cannot be cut and must not be padded, or shapes that do not match.
        """
        tokens = arguments.get("input_ids")
        tokens = arguments.get("inputs_embeds") if tokens is None else tokens
        batch_size, seq_len = tokens.shape[:2]
        layout = self.layout(seq_len)
        missing = layout.seq_len - seq_len
        local = dict(arguments)
        for name, value in (("input_ids", self.pad_token_id), ("inputs_embeds", 0), ("token_type_ids", 0)):
            if arguments.get(name) is not None:
                _check_length(name, arguments[name], 1, seq_len)
                local[name] = layout.shard(_pad(arguments[name], missing, 1, value), 1, self.rank)
        positions = arguments.get("position_ids")
        local["position_ids"] = self._positions(positions, tokens, layout)
        mask = local.pop("attention_mask", None)
        key_mask = self._key_mask(mask, batch_size, missing, tokens.device, seq_len)
        local.pop("labels", None), local.pop("shift_labels", None)
        return local, ShardedBatch(
            layout=layout,
            seq_len=seq_len,
            batch_size=batch_size,
            labels=self._labels(arguments, layout),
            key_mask=key_mask,
            mask=self._own_mask(mask, layout, missing, seq_len),
            document_ids=_documents(positions, batch_size, missing) if packed else None,
            positions=local["position_ids"],
        )

    def layout(self, seq_len: int) -> Layout:
        """Who holds what of a batch with so many tokens per sequence, padding added. Raises as `shard` does."""
        multiple = length_multiple(self.size, self.mode)
        padded = padded_length(seq_len, multiple)
        if padded != seq_len and self.padding == "refuse":
            raise ValueError(
                f"the batch has {seq_len} tokens per sequence, which is no multiple of {multiple} "
                f"(sequence_parallel.size {self.size}, mode {self.mode!r}); pad it to {padded}, or set "
                'ds4sci.sequence_parallel.padding to "pad"'
            )
        return Layout(padded, self.size, self.mode)

    def _positions(self, position_ids, tokens, layout):
        """Global positions. Padding repeats the last one: a learned table may end there."""
        seq_len = tokens.shape[1]
        if position_ids is None:
            position_ids = torch.arange(seq_len, device=tokens.device).unsqueeze(0)
        _check_length("position_ids", position_ids, 1, seq_len)
        last = position_ids[:, -1:].expand(-1, layout.seq_len - seq_len)
        return layout.shard(torch.cat((position_ids, last), 1), 1, self.rank)

    def _labels(self, arguments, layout):
        labels = arguments.get("shift_labels")
        if labels is None:
            labels = arguments.get("labels")
            if labels is None:
                return None
            labels = shift_labels(labels) if self.causal else labels
        missing = layout.seq_len - labels.shape[1]
        return layout.shard(_pad(labels, missing, 1, IGNORE_INDEX), 1, self.rank)

    def _key_mask(self, mask, batch_size, missing, device, seq_len):
        """[B, 1, 1, S], or None where every key is attended to or padding comes after every real query."""
        given = mask if mask is not None and mask.dim() == 2 else None
        if given is not None:
            _check_length("attention_mask", given, 1, seq_len)
            given = given.bool()
            given = None if given.all() else given
        if given is None and (missing == 0 or self.causal):
            return None
        if given is None:
            given = torch.ones(batch_size, seq_len, dtype=torch.bool, device=device)
        return _pad(given, missing, 1, False)[:, None, None, :]

    def _own_mask(self, mask, layout, missing, seq_len):
        """The rows of this rank of a 4-D mask. Padding is seen by nobody; its own rows see nothing."""
        if mask is None or mask.dim() == 2:
            return None
        if mask.dim() != 4:
            raise ValueError(f"attention_mask must be [B, S] or [B|1, H|1, S, S], got shape {tuple(mask.shape)}")
        for axis in (2, 3):
            _check_length("attention_mask", mask, axis, seq_len)
        if not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise ValueError(f"a 4-D attention_mask must be bool (True = keep) or a float bias, got {mask.dtype}")
        closed = False if mask.dtype == torch.bool else float("-inf")
        mask = _pad(_pad(mask, missing, 3, closed), missing, 2, closed)
        return layout.shard(mask, 2, self.rank)


def _documents(positions, batch_size, missing):
    """[B, S]: which document a token is in, counted from 0; None if there is one per sequence."""
    if positions is None:
        return None
    starts = F.pad(positions.diff(dim=1) != 1, (1, 0), value=False)
    if not starts.any():
        return None
    return _pad(starts.cumsum(1).expand(batch_size, -1), missing, 1, -1)


def _check_length(name, tensor, axis, seq_len):
    if tensor.shape[axis] != seq_len:
        raise ValueError(f"{name} must have {seq_len} tokens on axis {axis}, got shape {tuple(tensor.shape)}")


def _pad(tensor, missing, axis, value):
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat((tensor, tensor.new_full(shape, value)), axis)


def batch_device(arguments: dict) -> torch.device:
    """Where a batch is: where its tokens or images are. A mask may wait in CPU memory."""
    return next(arguments[name].device for name in _INPUTS if name in arguments)


def same_batch(arguments: dict, group: dist.ProcessGroup, size: int) -> bool:
    """Whether each sequence group has the same tensors on all its ranks: shapes, and a checksum that sees order.

    Args:
        group: one sequence group, or all of them: every rank of it gets the same answer.
        size: ranks of a sequence group, which are neighbours in `group`.
    """
    numbers = []
    for name in sorted(arguments):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            numbers += [zlib.crc32(f"{name} {tuple(value.shape)} {value.dtype}".encode()), _checksum(value)]
    device = batch_device(arguments)
    mine = torch.stack(
        [torch.as_tensor(number, dtype=torch.int64, device=device) for number in [len(numbers), *numbers]]
    )
    # The numbers of tensors may differ, and with them the lengths: compare the lengths first.
    digest = torch.stack((mine.numel() + mine.new_zeros(()), _checksum(mine)))
    everyone = [torch.empty_like(digest) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, digest, group=group)
    by_sequence = torch.stack(everyone).unflatten(0, (-1, size))
    return bool((by_sequence == by_sequence[:, :1]).all())


def _checksum(tensor):
    """Order-dependent sum of a tensor's bits, int64. A mask is as large as memory allows, so some at a time."""
    flat = tensor.detach().contiguous().flatten()
    if flat.is_floating_point():
        flat = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first in range(0, flat.numel(), _CHECKED_AT_ONCE):
        bits = flat[first : first + _CHECKED_AT_ONCE].to(torch.int64)
        weights = torch.arange(first + 1, first + 1 + bits.numel(), device=bits.device) * 2654435761 % 2**31
        total += (bits * (2 * weights + 1)).sum()
    return total


def all_batches(arguments: dict, group: dist.ProcessGroup) -> list[dict]:
    """The arguments of every rank of the group, in rank order, each where this rank's own of that name is."""
    device = batch_device(arguments)
    devices = {name: value.device for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    mine = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return [
        {
            name: value.to(devices.get(name, device)) if isinstance(value, torch.Tensor) else value
            for name, value in each.items()
        }
        for each in everyone
    ]

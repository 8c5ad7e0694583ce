# SPDX-License-Identifier: Apache-2.0
"""The hook of `ds4sci.attention_mask`: explicit masks, built once for each batch where they fit.

A rank holds what its attention works on and nothing else: the rows of its two chunks in a ring; under all-to-all over
heads all rows, of its own heads where heads differ.
"""

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from deepspeed_ds4sci.hooks.attention import attention_state
from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import family_of
from deepspeed_ds4sci.sequence.inputs import ShardedBatch
from deepspeed_ds4sci.sequence.masks import MaskFactory, within
from deepspeed_ds4sci.sequence.scores import MaskRule
from deepspeed_ds4sci.sequence.ulysses import own_heads


class AttentionMaskHook:
    name = "attention_mask"

    def before_engine(self, model, context):
        block, family = context.config.attention_mask, family_of(model)
        if family.documents_from not in family.others:
            raise NotImplementedError(
                f"ds4sci.attention_mask does not go with {type(model).__name__}, whose batches have no masks"
            )
        state = attention_state(model, context)
        if block.kind == "causal" and not state.sharder.causal:
            raise ValueError(
                f'ds4sci.attention_mask.kind = "causal" does not go with {type(model).__name__}, which attends both '
                'ways; use "document" or "custom"'
            )
        state.masks = MaskBuilder(
            kind=block.kind,
            cpu_threshold=block.cpu_threshold,
            rule=_load_rule(block.rule) if block.rule else None,
            causal=state.sharder.causal,
            window=family.window(model, state),
            heads=family.heads(model),
            rank=state.sharder.rank,
            mask_says_all=family.mask_says_all,
            needs=family.documents_from,
        )
        state.refuse_unsupported()
        count = len(family.attention_modules(model))
        return Change(
            count,
            f"{count} {family.attention} modules attend under an explicit {block.kind} mask, built on the device up "
            f"to {block.cpu_threshold} tokens and in CPU memory above",
        )

    def after_engine(self, engine, context):
        """Nothing is left to do."""


@dataclass
class MaskBuilder:
    """Makes the mask of each batch. See AttentionMaskConfig for kind, cpu_threshold and rule.

    Args:
        causal, window: what the model's attention does by itself, see `scores.window_limits`.
        heads: query heads of the model.
        rank: place in the sequence group.
        mask_says_all, needs: see `families.Family` (`needs` is its documents_from).
    """

    kind: str
    cpu_threshold: int
    rule: MaskRule | None
    causal: bool
    window: int | None
    heads: int
    rank: int
    mask_says_all: bool
    needs: str
    _latest: Any = None  # (what it depends on, mask) of a mask that depends on lengths only

    def take(self, arguments: dict) -> torch.Tensor | MaskRule | None:
        """Takes a custom mask out of a batch.

        Raises:
            ValueError: a batch without what the kind of mask is made from, or with a mask of its own beside it.
        """
        given = arguments.get("attention_mask")
        is_custom = given is not None and not (isinstance(given, torch.Tensor) and given.dim() == 2)
        if self.kind == "document" and self.needs not in arguments:
            raise ValueError(
                f'ds4sci.attention_mask.kind = "document" needs {self.needs} in the batch, got '
                f"{', '.join(sorted(arguments))}"
            )
        if is_custom and self.kind != "custom":
            raise ValueError(
                f'the batch has an attention_mask of its own, which ds4sci.attention_mask.kind = "{self.kind}" has no '
                'place for; use "custom"'
            )
        if is_custom and self.rule is not None:
            raise ValueError("the batch has an attention_mask of its own beside ds4sci.attention_mask.rule; leave one")
        if self.kind == "custom" and not is_custom and self.rule is None:
            raise ValueError(
                'ds4sci.attention_mask.kind = "custom" needs a rule in the config, or an attention_mask in the batch: '
                "[B|1, H|1, S, S], or a function (batch, head, query, key) -> bool"
            )
        return arguments.pop("attention_mask") if is_custom else self.rule

    def build(self, batch: ShardedBatch, custom: torch.Tensor | MaskRule | None, device) -> ShardedBatch:
        """The batch with its mask: [B|1, H|1, rows that this rank attends for, S], on the device."""
        layout, is_tensor = batch.layout, isinstance(custom, torch.Tensor)
        alone = is_tensor and self.mask_says_all
        documents = None if alone else batch.document_ids
        limits = dict(causal=self.causal and not alone, window=self.window, document_ids=documents)
        padding = None if alone or batch.key_mask is None else batch.key_mask[:, 0, 0]
        lengths_only = custom is None and documents is None and padding is None
        key = (layout, device)
        if lengths_only and self._latest is not None and self._latest[0] == key:
            return replace(batch, mask=self._latest[1], built=True, limits=limits)
        self._latest = None  # before the next one takes its memory
        factory = MaskFactory(device, self.cpu_threshold, custom.dtype if is_tensor else torch.bool)
        per_batch, per_head = (False, False)
        if is_tensor:
            custom = _whole(custom, batch)
        elif custom is not None:
            custom = within(custom, batch.seq_len)
            per_batch, per_head = _depends_on(
                custom, batch.batch_size, self.heads, factory.build_device(layout.seq_len)
            )
        own = own_heads(self.heads, layout.ulysses, layout.ulysses_rank(self.rank))
        if is_tensor and custom.shape[1] > 1:
            custom = custom[:, own[0] : own[1]]
        mask = factory(
            layout.seq_len,
            layout.attention_ranges(self.rank),
            **limits,
            padding_mask=padding,
            custom=custom,
            heads=own if per_head else (0, 1),
            num_samples=batch.batch_size if per_batch else 1,
        )
        if lengths_only:
            self._latest = key, mask
        return replace(batch, mask=mask, built=True, limits=limits)


def _whole(custom, batch):
    """A mask of the batch, which speaks about every token of it. Padding is beyond a square one, and closed in a row.

    Raises:
        ValueError: a mask of another size, which would say nothing about some tokens.
    """
    seq_len, padding = batch.seq_len, batch.layout.seq_len - batch.seq_len
    if custom.dim() != 4 or custom.shape[3] != seq_len or custom.shape[2] not in (1, seq_len):
        raise ValueError(f"attention_mask must be [B|1, H|1, S, S] with S = {seq_len}, got {list(custom.shape)}")
    if padding and custom.shape[2] == 1:
        closed = False if custom.dtype == torch.bool else float("-inf")
        return torch.nn.functional.pad(custom, (0, padding), value=closed)
    return custom


def _depends_on(rule, batch_size, heads, device):
    """Whether a function's result varies along batch and along head: what it does not look at is not in its shape."""
    batch = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=device).view(1, -1, 1, 1)
    first = torch.zeros(1, 1, dtype=torch.int64, device=device)
    shape = rule(batch, head, first, first).shape
    shape = (1,) * (4 - len(shape)) + tuple(shape)
    return shape[0] > 1, shape[1] > 1


def _load_rule(path):
    """The function that "module:function" names.

    Raises:
        ValueError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        rule = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"ds4sci.attention_mask.rule = {path!r} cannot be loaded: {error}") from error
    if not callable(rule):
        raise ValueError(f"ds4sci.attention_mask.rule = {path!r} is no function, got {type(rule).__name__}")
    return rule

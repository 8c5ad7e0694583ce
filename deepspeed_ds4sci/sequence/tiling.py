# SPDX-License-Identifier: Apache-2.0
"""Layers that treat tokens one by one, computed some tokens at a time to save memory.

Each tile runs under torch's non-reentrant activation checkpointing: its activations are formed again in the backward
pass, with the same random numbers, so dropout is right. All tiles belong to one autograd graph, so each parameter's
gradient arrives once per backward pass, which ZeRO's hooks count on.
"""

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def tiled(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tile: int, dim: int = 1) -> torch.Tensor:
    """function(x) for a function that treats positions along `dim` one by one, such as an MLP block.

    Args:
        function: keeps the length of `dim`; may hold parameters and dropout. It gets contiguous tiles.
        x: any shape.
        tile: positions at a time, at least 1. The last tile may be shorter.

    Returns:
        What function(x) returns. Activations inside `function` exist for one tile at a time.

    Raises:
        ValueError: tile below 1.
    """
    parts = _split(x, tile, dim)
    if len(parts) == 1:
        return function(x)

    def run(part):  # a copy, if there is one, is not kept for the backward pass
        return function(part.contiguous())

    return torch.cat([_recomputed(run, part) for part in parts], dim)


def tiled_cross_entropy(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    tile: int,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross entropy over labelled tokens, and their number, without all logits at once.

    Args:
        hidden: [..., h].
        head: [n, h] -> [n, vocabulary] logits, such as an nn.Linear; called as a module, so hooks on it run.
        labels: [...] int64, aligned with `hidden` (shifted already); `ignore_index` is not counted.
        tile: tokens at a time; logits exist for one tile, in fp32 and in the head's dtype.

    Returns:
        (loss sum, fp32 (fp64 for fp64 logits), 0-d; count, int64, 0-d). Both 0 where every label is ignored.

    Raises:
        ValueError: shapes that do not match, or tile below 1.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must be {list(hidden.shape[:-1])} like hidden, got {list(labels.shape)}")
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)

    def loss_of(part, part_labels):
        return cross_entropy_sum(head(part), part_labels, ignore_index)[0]

    parts = zip(_split(hidden, tile, 0), labels.split(tile), strict=True)
    losses = [_recomputed(loss_of, part, part_labels) for part, part_labels in parts]
    return torch.stack(losses).sum(), (labels != ignore_index).sum()


def cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum in at least fp32, number of labelled tokens) for logits [..., V] and labels [...]; 0 and 0 without any."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    labels = labels.reshape(-1)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum"), (labels != ignore_index).sum()


def load_checkpointing() -> None:
    """Imports what torch's checkpointing otherwise imports at its first call.

    An exception caught inside that import keeps the frames of its callers, and with them three tensors as large as
    what the first layer starts from, until Python looks for cycles, which a long step hardly makes it do.
    """
    importlib.import_module("torch._dynamo")


def _split(x, tile, dim):
    if tile < 1:
        raise ValueError(f"tile must be at least 1 token, got {tile}")
    return x.split(tile, dim)


def _recomputed(function, *arguments):
    # ZeRO-3 lets go of parameters in between, which the comparison of shapes would take for a change.
    return checkpoint(function, *arguments, use_reentrant=False, determinism_check="none")

# SPDX-License-Identifier: Apache-2.0
"""Attention on several ranks equals attention on one: output and every gradient, every mode, every feature."""

import dataclasses
import weakref

import pytest
import torch
import torch.distributed as dist

from deepspeed_ds4sci.sequence import blocks, ring, scores
from deepspeed_ds4sci.sequence.attention import SequenceParallelAttention
from deepspeed_ds4sci.sequence.layout import Layout
from deepspeed_ds4sci.sequence.scores import ScoreRules
from tests.distributed.sequence_run import results
from tests.unit.sequence.cases import CASES, case_arguments, make_qkv

BATCH, SEQ_LEN, HEAD_DIM = 2, 24, 5
LIMIT = 2e-6  # of the tensor's maximum, fp32
NAMES = ("o", "dq", "dk", "dv")
MODES = {
    1: ["ulysses", "ring"],
    2: ["ulysses", "ring"],
    4: ["ulysses", "ring", {"ulysses": 2, "ring": 2}],
}
GROUPED = (4, 2)  # query and key/value heads
HEAD_COUNTS = [GROUPED, (4, 1), (6, 3), (3, 3)]  # also multi-query, and heads that 2 or 4 ranks do not divide


def run(attention, qkv, do, **arguments):
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    output = attention(*qkv, **arguments)
    return [output.detach(), *torch.autograd.grad(output, qkv, do)]


def one_rank(qkv, do, **arguments):
    """The oracle, in fp64 where nothing is dropped at random."""
    return run(SequenceParallelAttention(implementation="math"), [x.double() for x in qkv], do.double(), **arguments)


def local_arguments(arguments, layout, rank, how):
    """Arguments as a rank has them. how: 0 local rows and ids, 1 the rows it works on and all ids."""
    arguments = dict(arguments)
    if "document_ids" in arguments and how == 0:
        arguments["document_ids"] = layout.shard(arguments["document_ids"], 1, rank)
    mask = arguments.get("mask")
    if isinstance(mask, torch.Tensor) and mask.shape[2] > 1:
        positions = layout.positions(rank) if how == 0 else layout.attention_positions(rank)
        arguments["mask"] = mask[:, :, positions]
    return arguments


def errors(attention, qkv, do, expected, how=0, **arguments):
    """Largest error of each tensor as a share of its maximum."""
    layout = attention.layout(qkv[0].shape[1] // attention.size)
    shards = [layout.shard(x, 1, attention.rank) for x in (*qkv, do)]
    arguments = local_arguments(arguments, layout, attention.rank, how)
    actual = run(attention, shards[:3], shards[3], **arguments)
    whole = [layout.shard(x, 1, attention.rank) for x in expected]
    return {
        name: float((got.double() - want).abs().max() / full.abs().max())
        for name, got, want, full in zip(NAMES, actual, whole, expected, strict=True)
    }


def compare_everything():
    """{(mode, implementation, case, heads): {tensor: error}} on this rank."""
    blocks.TILE, scores.DOCUMENT_BLOCK = 10, 4  # several tiles with a remainder
    found = {}
    modes = [SequenceParallelAttention(dist.group.WORLD, mode) for mode in MODES[dist.get_world_size()]]
    for case in CASES:
        for heads, groups in HEAD_COUNTS if case == "everything" else [GROUPED]:
            *qkv, do = make_qkv(BATCH, SEQ_LEN, heads, groups, HEAD_DIM)
            arguments = case_arguments(case, BATCH, SEQ_LEN, heads)
            expected = one_rank(qkv, do, **arguments)
            for attention in modes:
                for how in (0, 1) if case in ("mask", "padding") else (0,):
                    key = (str(attention.mode), case, heads, groups, how)
                    found[key] = errors(attention, qkv, do, expected, how, **arguments)
    for causal in (True, False):  # the fused kernel inside the ring, as on a GPU
        *qkv, do = make_qkv(BATCH, SEQ_LEN, 4, 2, 75)
        expected = one_rank(qkv, do, causal=causal)
        for mode in MODES[dist.get_world_size()][1:]:
            fused = SequenceParallelAttention(dist.group.WORLD, mode, implementation="flash")
            found[str(mode), "fused", causal] = errors(fused, qkv, do, expected, causal=causal)
    return found


def compare_dropout():
    """The same seed drops the same weights in every mode; ranks may be seeded differently."""
    found = {}
    *qkv, do = make_qkv(BATCH, SEQ_LEN, 4, 2, HEAD_DIM)
    torch.manual_seed(21)
    expected = one_rank(qkv, do, causal=True, dropout_p=0.3)
    for mode in MODES[dist.get_world_size()]:
        torch.manual_seed(21 + dist.get_rank())
        attention = SequenceParallelAttention(dist.group.WORLD, mode)
        found[str(mode)] = errors(attention, qkv, do, expected, causal=True, dropout_p=0.3)
    return found


def compare_two_groups():
    """Two groups of two ranks, with data of their own: a rank in the group is not its global rank."""
    if dist.get_world_size() != 4:
        return {}
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = dist.get_rank() // 2
    *qkv, do = make_qkv(BATCH, SEQ_LEN, *GROUPED, HEAD_DIM, seed=mine)
    expected = one_rank(qkv, do, causal=True)
    torch.manual_seed(mine)
    dropped = one_rank(qkv, do, causal=True, dropout_p=0.2)
    found = {}
    for mode in ("ulysses", "ring"):
        attention = SequenceParallelAttention(groups[mine], mode)
        found[mode] = errors(attention, qkv, do, expected, causal=True)
        torch.manual_seed(mine)
        found[mode, "dropout"] = errors(attention, qkv, do, dropped, causal=True, dropout_p=0.2)
    return found


def count_held_blocks():
    """Most received key/value blocks alive at one time in a forward and a backward pass."""
    alive, most = weakref.WeakSet(), 0
    first_init = ring._Transfer.__init__

    def counted(self, received, works, sent):
        nonlocal most
        first_init(self, received, works, sent)
        if received.dtype == torch.bfloat16:  # gradients travel in fp32
            alive.add(received)
            most = max(most, len(alive))

    ring._Transfer.__init__ = counted
    try:
        *qkv, do = make_qkv(1, SEQ_LEN, 2, 2, HEAD_DIM, torch.bfloat16)
        attention = SequenceParallelAttention(dist.group.WORLD, "ring")
        layout = attention.layout(SEQ_LEN // attention.size)
        shards = [layout.shard(x, 1, attention.rank) for x in (*qkv, do)]
        run(attention, shards[:3], shards[3])
    finally:
        ring._Transfer.__init__ = first_init
    return most


def other_dtypes():
    """Largest error of bf16 and whether everything is finite, for each mode."""
    found = {}
    *qkv, do = make_qkv(1, SEQ_LEN, 4, 2, 8, torch.bfloat16)
    expected = one_rank(qkv, do, causal=True)
    for mode in MODES[dist.get_world_size()]:
        attention = SequenceParallelAttention(dist.group.WORLD, mode)
        found[str(mode)] = errors(attention, qkv, do, expected, causal=True)
    return found


def refusals():
    """Messages of what a group cannot do."""
    messages = []
    q = torch.zeros(1, 3, 2, 4)
    for call in (
        lambda: SequenceParallelAttention(dist.group.WORLD, "ring")(q, q, q),
        lambda: SequenceParallelAttention(dist.group.WORLD, "ring", implementation="flex"),
        lambda: SequenceParallelAttention(dist.group.WORLD, "ring", implementation="flash")(q[:, :2], q[:, :2],
                                                                                            q[:, :2], window=2),
        lambda: SequenceParallelAttention(dist.group.WORLD, {"ulysses": 3, "ring": 2}),
    ):  # fmt: skip
        try:
            call()
        except (ValueError, NotImplementedError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def mutants():
    """What the comparison finds when the sharding is wrong on purpose: the largest error, which must be large."""

    def ungrouped_heads(rules, first, stop):
        return dataclasses.replace(for_heads(rules, 0, stop - first), first_head=0)

    def contiguous(layout, rank):
        part = layout.seq_len // layout.ring
        return ((layout.ring_rank(rank) * part, (layout.ring_rank(rank) + 1) * part),)

    def own_block(ring_, step):
        return ring_.rank

    for_heads = ScoreRules.for_heads
    wrong = {
        "ALiBi of the first heads on every rank": ("ulysses", ScoreRules, "for_heads", ungrouped_heads, "alibi"),
        "ring rows taken for contiguous": ("ring", Layout, "attention_ranges", contiguous, "causal"),
        "blocks taken for one's own": ("ring", ring._Ring, "source", own_block, "causal"),
    }
    found = {}
    *qkv, do = make_qkv(BATCH, SEQ_LEN, *GROUPED, HEAD_DIM)
    for name, (mode, owner, attribute, replacement, case) in wrong.items():
        arguments = case_arguments(case, BATCH, SEQ_LEN, GROUPED[0])
        expected = one_rank(qkv, do, **arguments)
        attention = SequenceParallelAttention(dist.group.WORLD, mode)
        shards = [attention.layout(SEQ_LEN // attention.size).shard(x, 1, attention.rank) for x in (*qkv, do)]
        right = getattr(owner, attribute)
        setattr(owner, attribute, replacement)
        try:
            actual = run(attention, shards[:3], shards[3], **arguments)
        finally:
            setattr(owner, attribute, right)
        whole = [attention.layout(SEQ_LEN // attention.size).shard(x, 1, attention.rank) for x in expected]
        error = max(
            float((got - want).abs().max() / want.abs().max()) for got, want in zip(actual, whole, strict=True)
        )
        every = [None] * attention.size
        dist.all_gather_object(every, error)  # one rank may be right by chance: the first one has the first heads
        found[name] = max(every)
    return found


def checks():
    return dict(
        everything=compare_everything(),
        dropout=compare_dropout(),
        groups=compare_two_groups(),
        held=count_held_blocks(),
        bf16=other_dtypes(),
        refusals=refusals(),
        mutants=mutants() if dist.get_world_size() > 1 else {},
    )


@pytest.mark.distributed(4)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_mode_equals_one_rank(world_size):
    for rank, result in enumerate(results(world_size)):
        result = result["attention"]
        for part in ("everything", "dropout", "groups"):
            for key, tensors in result[part].items():
                for name, error in tensors.items():
                    assert error <= LIMIT, f"rank {rank}, {key}, {name}: {error:.2e}"  # NaN fails too
        for mode, tensors in result["bf16"].items():
            assert max(tensors.values()) < 0.02, (rank, mode, tensors)
        if world_size > 1:
            assert result["held"] == min(world_size - 1, 2)
            length, flex, flash, grid = result["refusals"]
            assert "multiple of" in length and "pad it to" in length
            assert flex == 'NotImplementedError: a ring works with "auto", "tiled" or "flash" attention, got "flex"'
            assert '"flash" does not support window' in flash
            assert f"ulysses * ring = size = {world_size}, got 3 * 2" in grid
        assert len(result["everything"]) > 20 * len(MODES[world_size])
        assert all(error > 1e-3 for error in result["mutants"].values()), result["mutants"]

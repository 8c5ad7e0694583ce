# SPDX-License-Identifier: Apache-2.0
"""The layout against a definition written token by token."""

import pytest
import torch

from deepspeed_ds4sci.sequence.layout import Layout, length_multiple, padded_length, split_mode

MODES = [
    (1, "ulysses"),
    (1, "ring"),
    (2, "ulysses"),
    (3, "ulysses"),
    (2, "ring"),
    (3, "ring"),
    (4, {"ulysses": 2, "ring": 2}),
    (6, {"ulysses": 3, "ring": 2}),
    (8, {"ulysses": 2, "ring": 4}),
    (4, {"ulysses": 1, "ring": 4}),
    (4, {"ulysses": 4, "ring": 1}),
]


def naive_owner(position, seq_len, size, mode):
    """The rank of one token, from the words of the module's docstring."""
    ulysses, ring = split_mode(size, mode)
    if ring == 1:
        ring_rank, inside = 0, position
    else:
        chunk_len = seq_len // (2 * ring)
        chunk, offset = divmod(position, chunk_len)
        ring_rank = min(chunk, 2 * ring - 1 - chunk)
        inside = offset + (chunk_len if chunk >= ring else 0)
    return ring_rank * ulysses + inside // (seq_len // size)


@pytest.mark.parametrize(("size", "mode"), MODES, ids=str)
@pytest.mark.parametrize("times", [1, 3])
def test_every_token_is_where_the_definition_puts_it(size, mode, times):
    seq_len = times * length_multiple(size, mode)
    layout = Layout(seq_len, size, mode)
    for rank in range(size):
        expected = [position for position in range(seq_len) if naive_owner(position, seq_len, size, mode) == rank]
        assert layout.positions(rank).tolist() == expected
        assert len(expected) == layout.local_len


@pytest.mark.parametrize(("size", "mode"), MODES, ids=str)
def test_shard_and_unshard_are_inverse_and_agree_with_positions(size, mode):
    seq_len = 2 * length_multiple(size, mode)
    layout = Layout(seq_len, size, mode)
    whole = torch.randn(2, seq_len, 3)
    shards = [layout.shard(whole, 1, rank) for rank in range(size)]
    for rank, shard in enumerate(shards):
        assert torch.equal(shard, whole[:, layout.positions(rank)])
    assert torch.equal(layout.unshard(shards, 1), whole)
    assert torch.equal(layout.unshard([shard.transpose(1, 2) for shard in shards], -1), whole.transpose(1, 2))


@pytest.mark.parametrize(("size", "mode"), MODES, ids=str)
def test_joining_a_ulysses_group_gives_its_attention_rows(size, mode):
    layout = Layout(2 * length_multiple(size, mode), size, mode)
    for first in range(0, size, layout.ulysses):
        group = range(first, first + layout.ulysses)
        joined = torch.cat([layout.positions(rank) for rank in group])
        for rank in group:
            assert torch.equal(joined, layout.attention_positions(rank))


def test_zig_zag_balances_causal_work():
    layout = Layout(64, 4, "ring")
    work = [int((layout.positions(rank) + 1).sum()) for rank in range(4)]
    assert len(set(work)) == 1


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [(1, "ulysses", 1), (3, "ulysses", 3), (3, "ring", 6), (1, "ring", 1), (4, {"ulysses": 2, "ring": 2}, 4)]
    + [(6, {"ulysses": 3, "ring": 2}, 12), (8, {"ulysses": 4, "ring": 2}, 8)],
)
def test_length_multiple(size, mode, expected):
    assert length_multiple(size, mode) == expected


@pytest.mark.parametrize(("seq_len", "multiple", "expected"), [(1, 4, 4), (4, 4, 4), (5, 4, 8), (0, 4, 0), (7, 1, 7)])
def test_padded_length(seq_len, multiple, expected):
    assert padded_length(seq_len, multiple) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Layout(10, 4, "ulysses"), r"positive multiple of 4 tokens for size 4 .* got 10; pad it to 12"),
        (lambda: Layout(4, 4, "ring"), r"multiple of 8 tokens .* got 4; pad it to 8"),
        (lambda: Layout(0, 2, "ulysses"), r"got 0; pad it to 2"),
        (lambda: Layout(8, 2, "megatron"), r"mode must be .* got 'megatron'"),
        (lambda: Layout(8, 2, {"ulysses": 2}), r"mode must be .* got \{'ulysses': 2\}"),
        (lambda: Layout(8, 4, {"ulysses": 2, "ring": 3}), r"ulysses \* ring = size = 4, got 2 \* 3"),
        (lambda: Layout(8, 0, "ring"), r"size must be at least 1 rank, got 0"),
        (lambda: Layout(8, 2).positions(2), r"rank must be in \[0, 2\), got 2"),
        (lambda: Layout(8, 2).shard(torch.zeros(3, 7), 1, 0), r"8 tokens on axis 1, got shape \(3, 7\)"),
        (lambda: Layout(8, 2).unshard([torch.zeros(4)], 0), r"each of 2 ranks, got 1"),
        (lambda: Layout(8, 2).unshard([torch.zeros(4), torch.zeros(5)], 0), r"rank 1 must have 4 tokens .* \(5,\)"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()

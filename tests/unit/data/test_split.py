# SPDX-License-Identifier: Apache-2.0
"""The split keeps near-duplicates on one side and is reproducible."""

import numpy as np
import pytest

from deepspeed_ds4sci.data import split as split_module
from deepspeed_ds4sci.data import split_held_out
from deepspeed_ds4sci.data.alphabet import GAP, UNKNOWN, encode
from deepspeed_ds4sci.data.split import clusters_by_identity, identity_to


def family(num_groups=12, per_group=4, n_col=60, seed=0):
    """Groups of sequences that differ in about 10 % within and almost everywhere between groups."""
    rng = np.random.default_rng(seed)
    founders = rng.integers(0, 20, (num_groups, n_col))
    tokens = np.repeat(founders, per_group, axis=0)
    change = rng.random(tokens.shape) < 0.1
    return np.where(change, rng.integers(0, 20, tokens.shape), tokens).astype(np.uint8)


def test_identity_counts_only_columns_where_both_have_a_residue():
    tokens = np.stack([encode("ACDE-X"), encode("ACWEX-"), encode("A-----"), encode("------")])
    expected = [[1, 3 / 4, 1, 0], [3 / 4, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(identity_to(tokens, slice(None)), expected, rtol=1e-6)
    assert tokens[0, 5] == UNKNOWN and tokens[3, 0] == GAP


@pytest.mark.parametrize("chunk", [1, 100, 1 << 25])
def test_clusters_are_single_linkage(chunk, monkeypatch):
    monkeypatch.setattr(split_module, "_CHUNK_ELEMENTS", chunk)
    rows = ["AAAAAAAA", "AAAAAACC", "AAAACCCC", "WWWWWWWW", "WWWWWWWY", "HHHHHHHH"]
    clusters = clusters_by_identity(np.stack([encode(row) for row in rows]), 0.75)
    assert [list(clusters).index(c) for c in clusters] == [0, 0, 0, 3, 3, 5]


@pytest.mark.parametrize("max_identity", [0.4, 0.7])
def test_no_training_sequence_is_near_a_held_out_one(max_identity):
    tokens = family()
    train, held_out = split_held_out(tokens, fraction=0.25, max_identity=max_identity, seed=3)
    assert sorted([*train, *held_out]) == list(range(len(tokens)))
    assert 0 < len(held_out) <= 0.25 * len(tokens)
    between = identity_to(tokens, slice(None))[np.ix_(held_out, train)]
    assert between.max() < max_identity
    # Without the control the groups would be torn apart.
    assert identity_to(tokens, slice(None))[0, 1] > 0.7


def test_the_seed_alone_decides():
    tokens = family()
    first, again, other = (split_held_out(tokens, seed=seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_one_cluster_larger_than_the_share_is_still_held_out():
    tokens = family(num_groups=2, per_group=5)
    train, held_out = split_held_out(tokens, fraction=0.1, max_identity=0.5)
    assert len(train) == len(held_out) == 5


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(fraction=0.0), r"fraction must be in \(0, 1\), got 0.0"),
        (dict(fraction=1.0), r"fraction must be in \(0, 1\), got 1.0"),
        (dict(max_identity=0.0), r"max_identity must be in \(0, 1\], got 0.0"),
        (dict(max_identity=50), r"max_identity must be in \(0, 1\], got 50"),
        (dict(max_identity=0.001), "links all 48 sequences into one cluster, .* raise max_identity"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        split_held_out(family(), **options)

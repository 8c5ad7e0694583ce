# SPDX-License-Identifier: Apache-2.0
"""Splits an alignment into training and held-out sequences so that near-duplicates stay on one side."""

import numpy as np

from deepspeed_ds4sci.data.alphabet import NUM_AMINO_ACIDS

_CHUNK_ELEMENTS = 1 << 25


def identity_to(tokens: np.ndarray, rows: slice) -> np.ndarray:
    """Fraction of equal residues over the columns where both sequences have one of the 20 amino acids.

    Args:
        tokens: uint8 [n_seq, n_col].
        rows: which sequences to compare with all.

    Returns:
        fp32 [rows, n_seq], 0 where two sequences share no column.
    """
    n_seq = len(tokens)
    one_hot = (tokens[:, :, None] == np.arange(NUM_AMINO_ACIDS, dtype=np.uint8)).astype(np.float32)
    flat = one_hot.reshape(n_seq, -1)
    present = one_hot.sum(axis=-1)
    equal = flat[rows] @ flat.T
    both = present[rows] @ present.T
    return equal / np.maximum(both, 1.0)


def clusters_by_identity(tokens: np.ndarray, min_identity: float) -> np.ndarray:
    """Single linkage: two sequences at least this identical are in one cluster, and so is every chain of them.

    Returns:
        int64 [n_seq], the number of each sequence's cluster, counted from 0 by first member.
    """
    n_seq, n_col = tokens.shape
    parent = np.arange(n_seq)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    step = max(1, _CHUNK_ELEMENTS // max(1, n_seq))
    for start in range(0, n_seq, step):
        linked = identity_to(tokens, slice(start, start + step)) >= min_identity
        for i, j in zip(*np.nonzero(linked), strict=True):
            parent[root(int(j))] = root(start + int(i))
    return np.unique([root(i) for i in range(n_seq)], return_inverse=True)[1]


def split_held_out(
    tokens: np.ndarray, *, fraction: float = 0.2, max_identity: float = 0.5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses held-out sequences, whole clusters at a time, so that none is too similar to a training sequence.

    Args:
        tokens: uint8 [n_seq, n_col].
        fraction: of the sequences to hold out; at most this many are, and at least one cluster.
        max_identity: every training sequence is less identical than this to every held-out one.
        seed: of the order in which clusters are drawn.

    Returns:
        (train, held_out): sorted row numbers, int64.

    Raises:
        ValueError: `fraction` or `max_identity` is out of range, or all sequences form one cluster.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    if not 0.0 < max_identity <= 1.0:
        raise ValueError(f"max_identity must be in (0, 1], got {max_identity}")
    cluster_of = clusters_by_identity(tokens, max_identity)
    sizes = np.bincount(cluster_of)
    if len(sizes) < 2:
        raise ValueError(
            f"max_identity = {max_identity} links all {len(tokens)} sequences into one cluster, "
            "so that nothing can be held out: raise max_identity"
        )
    budget = fraction * len(tokens)
    order = np.random.default_rng(seed).permutation(len(sizes))
    chosen: list[int] = []
    taken = 0
    for cluster in order:
        if taken + sizes[cluster] <= budget:
            chosen.append(cluster)
            taken += sizes[cluster]
    if not chosen:
        chosen = [int(sizes.argmin())]
    held_out = np.isin(cluster_of, chosen)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)

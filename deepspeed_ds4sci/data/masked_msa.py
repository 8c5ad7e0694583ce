# SPDX-License-Identifier: Apache-2.0
"""Masked-MSA prediction: which residues to hide, training examples, held-out examples, the column-profile baseline.

Only the 20 amino acids are hidden and predicted; gaps and X are shown as they are. n_seq: sequences, n_res: columns.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from deepspeed_ds4sci.data.alphabet import MASK, NUM_AMINO_ACIDS

IGNORE = -100
"""Target of a position that is not predicted; what torch's cross entropy ignores."""


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Which residues are hidden and what is shown in their place. Probabilities; what remains of 1 shows the residue.

    The defaults are BERT's 80/10/10. `AF2_MASKING` is AlphaFold's choice.
    """

    rate: float = 0.15
    """Fraction of the residues to predict."""

    mask: float = 0.8
    """Shown as the mask token."""

    uniform: float = 0.1
    """Shown as any amino acid, all equally likely."""

    profile: float = 0.0
    """Shown as an amino acid drawn from the column's profile."""

    def __post_init__(self):
        for name in ("rate", "mask", "uniform", "profile"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be a probability in [0, 1], got {value}")
        if self.mask + self.uniform + self.profile > 1.0 + 1e-9:
            raise ValueError(
                f"mask + uniform + profile must be at most 1, got {self.mask + self.uniform + self.profile:.3g}"
            )


AF2_MASKING = Masking(rate=0.15, mask=0.7, uniform=0.1, profile=0.1)
"""Jumper et al. 2021, Supplementary 1.2.7."""


def column_profile(tokens: np.ndarray, pseudocount: float = 5.0) -> np.ndarray:
    """Amino-acid frequencies of each column, smoothed towards those of the whole alignment.

    profile[c] = (counts[c] + pseudocount * background) / (counts[c].sum() + pseudocount)

    Args:
        tokens: uint8 [n_seq, n_col]; gaps and X are not counted.
        pseudocount: how many residues the background weighs.

    Returns:
        fp64 [n_col, 20], rows sum to 1.
    """
    if not pseudocount > 0.0:
        raise ValueError(f"pseudocount must be positive, got {pseudocount}")
    counts = np.stack([(tokens == aa).sum(axis=0) for aa in range(NUM_AMINO_ACIDS)], axis=-1).astype(np.float64)
    # One of each amino acid, so that none has probability 0 anywhere.
    background = counts.sum(axis=0) + 1.0
    background /= background.sum()
    return (counts + pseudocount * background) / (counts.sum(axis=-1, keepdims=True) + pseudocount)


def hide_residues(
    tokens: np.ndarray, masking: Masking, profile: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hides residues of an alignment.

    Args:
        tokens: [n_seq, n_res], not changed.
        profile: fp64 [n_res, 20], of the same columns; used when masking.profile > 0.

    Returns:
        (shown, target): int64 [n_seq, n_res]; target is the residue where one is to be predicted, else IGNORE.
    """
    shown = tokens.astype(np.int64)
    hidden = (tokens < NUM_AMINO_ACIDS) & (rng.random(tokens.shape) < masking.rate)
    target = np.where(hidden, shown, IGNORE)
    choice = rng.random(tokens.shape)
    uniform = rng.integers(0, NUM_AMINO_ACIDS, tokens.shape)
    # Inverse transform sampling, one draw per position from its column.
    draw = rng.random((*tokens.shape, 1))
    from_profile = (draw > np.cumsum(profile, axis=-1)[..., :-1]).sum(axis=-1)
    shown = np.where(hidden & (choice < masking.mask), MASK, shown)
    edge = masking.mask + masking.uniform
    shown = np.where(hidden & (choice >= masking.mask) & (choice < edge), uniform, shown)
    shown = np.where(hidden & (choice >= edge) & (choice < edge + masking.profile), from_profile, shown)
    return shown, target


class MaskedMSADataset(Dataset):
    """Training examples without end: a sample of the sequences, a crop of the columns, some residues hidden.

    Example i depends on the seed and on i alone, so a run resumes by continuing to count.

    Args:
        tokens: uint8 [n_seq, n_col], the training sequences only.
        n_seq: sequences per example; all of them if there are fewer.
        n_res: adjacent columns per example; all of them if there are fewer.
        masking: what to hide.
        seed: of everything random.
        length: len() of the data set; any index works.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        n_seq: int,
        n_res: int,
        masking: Masking = Masking(),
        seed: int = 0,
        length: int = 2**31,
    ):
        for name, value in (("n_seq", n_seq), ("n_res", n_res), ("length", length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(f"tokens must be [n_seq, n_col] with at least one entry, got shape {list(tokens.shape)}")
        self.tokens = tokens
        self.n_seq = min(n_seq, tokens.shape[0])
        self.n_res = min(n_res, tokens.shape[1])
        self.masking = masking
        self.seed = seed
        self.length = length
        self.profile = column_profile(tokens)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns int64 tensors: shown and target [n_seq, n_res], columns [n_res] (numbers in the alignment)."""
        rng = np.random.default_rng([self.seed, index])
        rows = rng.choice(len(self.tokens), self.n_seq, replace=False)
        start = int(rng.integers(0, self.tokens.shape[1] - self.n_res + 1))
        columns = np.arange(start, start + self.n_res)
        shown, target = hide_residues(self.tokens[np.ix_(rows, columns)], self.masking, self.profile[columns], rng)
        return _example(shown, target, columns)


class HeldOutExamples(Dataset):
    """Held-out sequences with residues hidden, one at a time, under training sequences: a fixed test set.

    Row 0 is the held-out sequence; only there are residues hidden, and no other held-out sequence is ever shown. So a
    prediction has seen no more than the column profile of the training sequences has, and the rest of its own row. The
    columns are cut into windows of n_res; every sequence is tested in every window.

    Args:
        tokens: uint8 [n_seq, n_col], the whole alignment.
        train, held_out: row numbers.
        n_seq: rows per example, with the held-out one; the training sequences are a sample, the same for all examples.
        n_res: columns per example; all of them if there are fewer.
        rate: fraction of the residues to hide, all shown as the mask token.
        repeats: examples per sequence and window, each with its own choice of residues.
        seed: of everything random; two models with the same seed see the same examples.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        train: np.ndarray,
        held_out: np.ndarray,
        *,
        n_seq: int,
        n_res: int,
        rate: float = 0.15,
        repeats: int = 1,
        seed: int = 0,
    ):
        for name, value, least in (("n_seq", n_seq, 2), ("n_res", n_res, 1), ("repeats", repeats, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        size = min(n_seq - 1, len(train))
        chosen = np.random.default_rng([seed, 0]).choice(train, size, replace=False)
        self.context = tokens[chosen].astype(np.int64)
        self.queries = tokens[held_out]
        self.profile = column_profile(tokens[train])
        self.masking = Masking(rate=rate, mask=1.0, uniform=0.0)
        self.n_res = min(n_res, tokens.shape[1])
        self.windows = -(-tokens.shape[1] // self.n_res)
        self.repeats = repeats
        self.seed = seed

    def __len__(self) -> int:
        return len(self.queries) * self.windows * self.repeats

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Same fields as `MaskedMSADataset`; target is IGNORE below row 0 and where the previous window was."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}")
        query, rest = divmod(index, self.windows * self.repeats)
        window, repeat = divmod(rest, self.repeats)
        rng = np.random.default_rng([self.seed, 1, query, repeat])
        # Hidden in the whole row at once: the choice does not depend on where the windows are.
        shown, target = hide_residues(self.queries[query : query + 1], self.masking, self.profile, rng)
        begin = window * self.n_res
        # The last window is moved back to full width; what it shares with the one before is tested there.
        start = min(begin, shown.shape[1] - self.n_res)
        target[:, start:begin] = IGNORE
        columns = np.arange(start, start + self.n_res)
        context = self.context[:, columns]
        shown = np.concatenate([shown[:, columns], context])
        target = np.concatenate([target[:, columns], np.full_like(context, IGNORE)])
        return _example(shown, target, columns)


def _example(shown: np.ndarray, target: np.ndarray, columns: np.ndarray) -> dict[str, torch.Tensor]:
    return {
        "shown": torch.from_numpy(shown),
        "target": torch.from_numpy(target),
        "columns": torch.from_numpy(columns),
    }

# SPDX-License-Identifier: Apache-2.0
"""Hiding residues, training examples, the fixed test set, the column profile."""

import numpy as np
import pytest
import torch

from deepspeed_ds4sci.data import (
    AF2_MASKING,
    HeldOutExamples,
    MaskedMSADataset,
    Masking,
    column_profile,
    hide_residues,
)
from deepspeed_ds4sci.data.alphabet import GAP, MASK, UNKNOWN
from deepspeed_ds4sci.data.masked_msa import IGNORE


def alignment(n_seq=40, n_col=30, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 20, (n_seq, n_col)).astype(np.uint8)
    tokens[rng.random(tokens.shape) < 0.1] = GAP
    tokens[rng.random(tokens.shape) < 0.02] = UNKNOWN
    return tokens


def test_profile_is_smoothed_frequencies():
    tokens = np.array([[0, 1, GAP], [0, 2, GAP], [0, UNKNOWN, GAP]], dtype=np.uint8)
    profile = column_profile(tokens, pseudocount=2.0)
    background = (np.bincount([0, 0, 0, 1, 2], minlength=20) + 1) / 25
    np.testing.assert_allclose(profile[0], (3 * np.eye(20)[0] + 2 * background) / 5)
    np.testing.assert_allclose(profile[1], (np.eye(20)[1] + np.eye(20)[2] + 2 * background) / 4)
    np.testing.assert_allclose(profile[2], background)
    np.testing.assert_allclose(profile.sum(axis=-1), 1.0)
    with pytest.raises(ValueError, match="pseudocount must be positive, got 0"):
        column_profile(tokens, pseudocount=0)


@pytest.mark.parametrize("masking", [Masking(), AF2_MASKING, Masking(rate=0.4, mask=0.2, uniform=0.3, profile=0.4)])
def test_residues_are_hidden_in_the_stated_proportions(masking):
    tokens = np.full((400, 500), 3, dtype=np.uint8)
    tokens[:, 400:] = GAP
    profile = np.zeros((500, 20))
    profile[:, 7] = 1.0
    shown, target = hide_residues(tokens, masking, profile, np.random.default_rng(0))
    hidden = target != IGNORE
    assert (tokens == 3)[hidden].all() and (target[hidden] == 3).all()
    assert (shown[~hidden] == tokens[~hidden]).all()
    assert hidden[:, :400].mean() == pytest.approx(masking.rate, abs=0.005)
    at = shown[hidden]
    uniform = masking.uniform / 20
    assert (at == MASK).mean() == pytest.approx(masking.mask, abs=0.01)
    assert (at == 7).mean() == pytest.approx(masking.profile + uniform, abs=0.01)
    kept = 1 - masking.mask - masking.uniform - masking.profile
    assert (at == 3).mean() == pytest.approx(kept + uniform, abs=0.01)
    assert (at == 11).mean() == pytest.approx(uniform, abs=0.005)


def test_profile_draws_follow_the_column():
    tokens = np.zeros((20000, 2), dtype=np.uint8)
    profile = np.zeros((2, 20))
    profile[0, [4, 9]] = 0.25, 0.75
    profile[1, 19] = 1.0
    masking = Masking(rate=1.0, mask=0.0, uniform=0.0, profile=1.0)
    shown, _ = hide_residues(tokens, masking, profile, np.random.default_rng(0))
    assert (shown[:, 0] == 9).mean() == pytest.approx(0.75, abs=0.02) and set(shown[:, 0]) == {4, 9}
    assert (shown[:, 1] == 19).all()


def test_gaps_and_unknown_residues_are_never_hidden():
    tokens = alignment()
    shown, target = hide_residues(
        tokens, Masking(rate=1.0, mask=1.0, uniform=0.0), column_profile(tokens), np.random.default_rng(0)
    )
    assert ((target == IGNORE) == (tokens >= 20)).all()
    assert (shown[tokens >= 20] == tokens[tokens >= 20]).all()


def test_training_examples_are_a_function_of_seed_and_position():
    tokens = alignment()
    first, again = (MaskedMSADataset(tokens, n_seq=8, n_res=12, seed=4) for _ in range(2))
    other = MaskedMSADataset(tokens, n_seq=8, n_res=12, seed=5)
    order = [7, 0, 7, 10**6]
    for i in order:
        for name, value in first[i].items():
            assert torch.equal(value, again[i][name])
    assert not torch.equal(first[0]["shown"], first[1]["shown"])
    assert not torch.equal(first[0]["shown"], other[0]["shown"])


def test_training_examples_show_rows_and_columns_of_the_alignment():
    tokens = alignment()
    dataset = MaskedMSADataset(tokens, n_seq=8, n_res=12)
    starts = set()
    for i in range(200):
        example = dataset[i]
        columns = example["columns"].numpy()
        starts.add(columns[0])
        assert (np.diff(columns) == 1).all() and columns[0] >= 0 and columns[-1] < 30
        restored = torch.where(example["target"] == IGNORE, example["shown"], example["target"]).numpy()
        rows = {row.tobytes() for row in tokens[:, columns]}
        assert restored.shape == (8, 12) and all(row.astype(np.uint8).tobytes() in rows for row in restored)
    assert starts == set(range(19))
    assert len(dataset) == 2**31


def test_a_small_alignment_is_used_whole():
    example = MaskedMSADataset(alignment(5, 6), n_seq=64, n_res=64)[3]
    assert example["shown"].shape == example["target"].shape == (5, 6) and example["columns"].tolist() == list(
        range(6)
    )


def held_out(**options):
    tokens = alignment()
    rows = np.arange(40)
    return tokens, HeldOutExamples(tokens, rows[8:], rows[:8], **{**dict(n_seq=9, n_res=12), **options})


def test_only_the_held_out_row_is_hidden_and_the_rest_is_training_sequences():
    tokens, examples = held_out(repeats=2, rate=0.3)
    assert len(examples) == 8 * 3 * 2
    for i in range(len(examples)):
        example, columns = examples[i], examples[i]["columns"].numpy()
        assert example["shown"].shape == (9, 12)
        assert (example["target"][1:] == IGNORE).all()
        query = tokens[i // 6][columns]
        hidden = example["target"][0].numpy() != IGNORE
        assert (example["target"][0].numpy()[hidden] == query[hidden]).all()
        assert set(example["shown"][0][hidden].tolist()) <= {MASK}
        training = {row.tobytes() for row in tokens[8:, columns]}
        assert all(row.astype(np.uint8).tobytes() in training for row in example["shown"][1:].numpy())


def test_windows_cover_every_column_once():
    _, examples = held_out(rate=1.0)
    counts = np.zeros((8, 30), dtype=int)
    for i in range(len(examples)):
        example = examples[i]
        counts[i // 3, example["columns"][example["target"][0] != IGNORE].numpy()] += 1
    assert set(counts[alignment()[:8] < 20]) == {1} and set(counts[alignment()[:8] >= 20]) == {0}


def test_what_is_hidden_does_not_depend_on_the_windows():
    def hidden(n_res):
        _, examples = held_out(n_res=n_res, seed=3)
        return {
            (i // examples.windows, int(column))
            for i in range(len(examples))
            for column in examples[i]["columns"][examples[i]["target"][0] != IGNORE]
        }

    assert hidden(12) == hidden(7) == hidden(64)


def test_repeats_and_seeds_hide_other_residues():
    _, examples = held_out(repeats=2)
    _, same = held_out(repeats=2)
    _, other = held_out(repeats=2, seed=1)
    assert torch.equal(examples[0]["target"], same[0]["target"])
    assert not torch.equal(examples[0]["target"], examples[1]["target"])
    assert not torch.equal(examples[0]["target"], other[0]["target"])


def test_the_profile_is_of_the_training_sequences_alone():
    tokens, examples = held_out()
    np.testing.assert_array_equal(examples.profile, column_profile(tokens[8:]))


def test_iteration_ends():
    _, examples = held_out()
    assert len(list(examples)) == len(examples)
    with pytest.raises(IndexError, match=r"index must be in \[0, 24\), got 24"):
        examples[24]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Masking(rate=1.5), r"rate must be a probability in \[0, 1\], got 1.5"),
        (lambda: Masking(uniform=-0.1), r"uniform must be a probability in \[0, 1\], got -0.1"),
        (lambda: Masking(mask=0.8, profile=0.2), r"mask \+ uniform \+ profile must be at most 1, got 1.1"),
        (lambda: MaskedMSADataset(alignment(), n_seq=0, n_res=3), "n_seq must be at least 1, got 0"),
        (lambda: MaskedMSADataset(alignment(), n_seq=3, n_res=0), "n_res must be at least 1, got 0"),
        (lambda: MaskedMSADataset(alignment(), n_seq=3, n_res=3, length=0), "length must be at least 1, got 0"),
        (lambda: MaskedMSADataset(alignment()[:0], n_seq=3, n_res=3), r"tokens must be \[n_seq, n_col\] .* \[0, 30\]"),
        (lambda: held_out(n_seq=1), "n_seq must be at least 2, got 1"),
        (lambda: held_out(n_res=0), "n_res must be at least 1, got 0"),
        (lambda: held_out(repeats=0), "repeats must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

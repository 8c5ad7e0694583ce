# SPDX-License-Identifier: Apache-2.0
"""The baselines: probabilities that add up, counted within documents."""

import math
from itertools import product

import numpy as np
import pytest

from deepspeed_ds4sci.data.genomes import CODONS, SINGLE_NUCLEOTIDES, CodonFrequencies, NucleotideMarkov, nucleotides
from deepspeed_ds4sci.data.genomes.documents import Window


def window(*texts, tokenizer=CODONS):
    tokens = [tokenizer.encode(nucleotides.encode(text.encode())) for text in texts]
    documents = [np.full(len(part), number, dtype=np.int32) for number, part in enumerate(tokens)]
    return Window(np.concatenate(tokens), np.concatenate(documents))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_probabilities_of_all_continuations_add_up_to_one(order):
    rng = np.random.default_rng(order)
    text = "".join(rng.choice(list("ACGT"), 300, p=[0.4, 0.1, 0.2, 0.3]))
    model = NucleotideMarkov(CODONS, order).fit([window(text)])
    total = 0.0
    for letters in product("ACGT", repeat=3):
        total += math.exp(-model.token_nll(window("ATG" + "".join(letters)))[1])
    assert total == pytest.approx(1.0)


def test_the_likelihood_is_that_of_the_counts():
    model = NucleotideMarkov(SINGLE_NUCLEOTIDES, 2, pseudocount=1.0)
    model.fit([window("AACAACAAG", tokenizer=SINGLE_NUCLEOTIDES)])
    # After AA: C, C, G. After a start: A.
    nll = model.token_nll(window("AAC", tokenizer=SINGLE_NUCLEOTIDES))
    assert np.exp(-nll) == pytest.approx([2 / 5, 2 / 5, 3 / 7])


def test_contexts_end_with_documents_and_ambiguity():
    model = NucleotideMarkov(SINGLE_NUCLEOTIDES, 1, pseudocount=1.0)
    model.fit([window("AC", "GN", tokenizer=SINGLE_NUCLEOTIDES)])
    start = 4 * 1 + 0  # the context letter of a start is the ambiguous one
    assert model.counts[start].tolist() == [2, 1, 2, 1]
    assert model.counts[0].tolist() == [1, 2, 1, 1] and model.counts[2].tolist() == [1, 1, 1, 1]


def test_special_tokens_are_not_scored():
    tokens = np.array([1, 10, 0, 2, 3], dtype=np.uint8)
    one = Window(tokens, np.array([0, 0, 0, 0, -1], dtype=np.int32))
    for model in (NucleotideMarkov(CODONS).fit([one]), CodonFrequencies(CODONS).fit([one])):
        assert np.isnan(model.token_nll(one)).tolist() == [True, False, True, True, True]


def test_frequencies_are_those_of_codons():
    model = CodonFrequencies(CODONS, pseudocount=0.5).fit([window("ATGATGGGC")])
    assert np.exp(-model.token_nll(window("ATGGGCTTT"))) == pytest.approx([2.5 / 35, 1.5 / 35, 0.5 / 35])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="order must be at least 0 and pseudocount positive, got -1 and 1.0"):
        NucleotideMarkov(CODONS, -1)

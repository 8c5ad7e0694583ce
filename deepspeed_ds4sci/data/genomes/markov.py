# SPDX-License-Identifier: Apache-2.0
"""Markov models of genomes: the baseline that a language model has to beat."""

from collections.abc import Iterable

import numpy as np

from deepspeed_ds4sci.data.genomes.documents import NO_DOCUMENT, Window
from deepspeed_ds4sci.data.genomes.nucleotides import AMBIGUOUS
from deepspeed_ds4sci.data.genomes.tokenizer import FIRST_WORD, GenomeTokenizer

_LETTERS = AMBIGUOUS + 1


class NucleotideMarkov:
    """p(nucleotide | the `order` before it in its document), counted in windows, with `pseudocount` of each of four.

    Where fewer nucleotides come before, because a document or window starts or one is ambiguous, those are one more
    letter of the context. Ambiguous nucleotides are not predicted.
    """

    def __init__(self, tokenizer: GenomeTokenizer, order: int = 2, pseudocount: float = 1.0):
        if order < 0 or not pseudocount > 0:
            raise ValueError(f"order must be at least 0 and pseudocount positive, got {order} and {pseudocount}")
        self.tokenizer, self.order = tokenizer, order
        self.counts = np.full((_LETTERS**order, 4), pseudocount)

    def fit(self, windows: Iterable[Window]) -> "NucleotideMarkov":
        """Adds the nucleotides of windows to the counts."""
        for window in windows:
            contexts, letters = self._pairs(window)
            known = letters != AMBIGUOUS
            np.add.at(self.counts, (contexts[known], letters[known]), 1)
        return self

    def token_nll(self, window: Window) -> np.ndarray:
        """fp64 [context]: negative log likelihood of each token in nats, its nucleotides' sum; NaN for specials."""
        log_p = np.log(self.counts / self.counts.sum(axis=1, keepdims=True))
        contexts, letters = self._pairs(window)
        known = letters != AMBIGUOUS
        nll = np.zeros(letters.shape)
        nll[known] = -log_p[contexts[known], letters[known]]
        per_token = nll.reshape(-1, self.tokenizer.word_length).sum(axis=1)
        return np.where(window.tokens >= FIRST_WORD, per_token, np.nan)

    def _pairs(self, window):
        """(context number, nucleotide) of each nucleotide of the window."""
        letters = self.tokenizer.to_codes(window.tokens).reshape(-1).astype(np.int64)
        documents = np.repeat(window.documents, self.tokenizer.word_length)
        contexts = np.zeros(len(letters), dtype=np.int64)
        for distance in range(self.order, 0, -1):
            before = np.full(len(letters), AMBIGUOUS, dtype=np.int64)
            same = (documents[distance:] == documents[:-distance]) & (documents[distance:] != NO_DOCUMENT)
            before[distance:][same] = letters[:-distance][same]
            contexts = contexts * _LETTERS + before
        return contexts, letters


class CodonFrequencies:
    """p(token) from its frequency: an order-0 model of whole tokens, the same interface."""

    def __init__(self, tokenizer: GenomeTokenizer, pseudocount: float = 1.0):
        self.counts = np.full(tokenizer.vocab_size, pseudocount)
        self.counts[:FIRST_WORD] = 0

    def fit(self, windows: Iterable[Window]) -> "CodonFrequencies":
        for window in windows:
            np.add.at(self.counts, window.tokens[window.tokens >= FIRST_WORD], 1)
        return self

    def token_nll(self, window: Window) -> np.ndarray:
        with np.errstate(divide="ignore"):
            nll = -np.log(self.counts / self.counts.sum())
        return np.where(window.tokens >= FIRST_WORD, nll[window.tokens], np.nan)

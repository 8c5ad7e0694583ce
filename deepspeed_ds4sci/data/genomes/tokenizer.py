# SPDX-License-Identifier: Apache-2.0
"""Genome tokens: codons with GenSLM's numbers, or single nucleotides.

Both start with five special tokens. A codon or nucleotide that is ambiguous is [UNK]; nucleotides left over at the end
of a sequence whose length is no multiple of three are dropped.
"""

from dataclasses import dataclass, field

import numpy as np

from deepspeed_ds4sci.data.genomes import nucleotides
from deepspeed_ds4sci.data.genomes.nucleotides import AMBIGUOUS, NUCLEOTIDES

SPECIAL_TOKENS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
UNK, CLS, SEP, PAD, MASK = range(5)
FIRST_WORD = len(SPECIAL_TOKENS)
"""The first token that is no special one."""

# Source: the released vocabulary of GenSLM (Zvyagin et al. 2023), whose numbers the published weights go with. The
# codons stand in the order of their frequency there.
_CODONS_BY_FREQUENCY = (
    "GGC GCC ATC GAC GAA ATG GTG CTG GTC GCG GAT AAA GGT AAG GAG ACC AAC GTT ATT GCA CTC CGC "
    "GCT CAG CCG TTC GTA TCG GGA AAT TAC CTT TTG ACG TCC GGG AGC CCC ACA ACT TCT TTA CGT TAT "
    "CAA CGG TTT CAC CCT CCA TGG ATA TCA TGC AGT AGA CAT TGT CTA AGG TAA CGA TGA TAG"
)
GENSLM_CODONS = tuple(_CODONS_BY_FREQUENCY.split())


@dataclass(frozen=True)
class GenomeTokenizer:
    """Nucleotide codes <-> tokens.

    words: what a token stands for, all of the same length; token FIRST_WORD + i is words[i].
    """

    name: str
    words: tuple[str, ...]
    _token_of_code: np.ndarray = field(init=False, repr=False, compare=False)
    _complement: np.ndarray = field(init=False, repr=False, compare=False)
    _codes: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        codes = np.stack([nucleotides.encode(word.encode()) for word in self.words])
        table = np.full((AMBIGUOUS + 1) ** self.word_length, UNK, dtype=np.uint8)
        tokens = np.arange(FIRST_WORD, FIRST_WORD + len(self.words), dtype=np.uint8)
        table[self._number(codes.reshape(-1))] = tokens
        complement = np.arange(self.vocab_size, dtype=np.uint8)
        complement[[CLS, SEP]] = SEP, CLS  # read backwards, the end is the start
        complement[FIRST_WORD:] = table[self._number((3 - codes[:, ::-1]).reshape(-1))]
        of_special = np.full((FIRST_WORD, self.word_length), AMBIGUOUS, dtype=np.uint8)
        for name, value in (
            ("_token_of_code", table),
            ("_complement", complement),
            ("_codes", np.concatenate([of_special, codes])),
        ):
            object.__setattr__(self, name, value)

    @property
    def word_length(self) -> int:
        """Nucleotides per token."""
        return len(self.words[0])

    @property
    def vocab_size(self) -> int:
        return FIRST_WORD + len(self.words)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Text of each token -> its number."""
        return {word: token for token, word in enumerate((*SPECIAL_TOKENS, *self.words))}

    def encode(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [n] codes of `nucleotides` -> uint8 [n // word_length] tokens."""
        whole = len(codes) // self.word_length * self.word_length
        return self._token_of_code[self._number(codes[:whole])]

    def decode(self, tokens: np.ndarray) -> str:
        """Tokens -> words and special tokens, separated by spaces, as GenSLM writes them."""
        names = (*SPECIAL_TOKENS, *self.words)
        return " ".join(names[token] for token in tokens)

    def to_codes(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens [...] -> uint8 [..., word_length] nucleotide codes, AMBIGUOUS for special tokens."""
        return self._codes[tokens]

    def reverse_complement(self, tokens: np.ndarray) -> np.ndarray:
        """The same stretch on the other strand, in its reading direction; [CLS] and [SEP] change places."""
        return self._complement[tokens[::-1]]

    def _number(self, codes):
        number = codes[0 :: self.word_length]
        for place in range(1, self.word_length):
            number = number * np.uint8(AMBIGUOUS + 1) + codes[place :: self.word_length]
        return number


CODONS = GenomeTokenizer("codon", GENSLM_CODONS)
SINGLE_NUCLEOTIDES = GenomeTokenizer("nucleotide", tuple(NUCLEOTIDES))
TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (CODONS, SINGLE_NUCLEOTIDES)}

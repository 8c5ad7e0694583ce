# SPDX-License-Identifier: Apache-2.0
"""Tokens of an alignment: 20 amino acids in AlphaFold's order, X, gap, mask."""

import numpy as np

AMINO_ACIDS = "ARNDCQEGHILKMFPSTWYV"
NUM_AMINO_ACIDS = len(AMINO_ACIDS)
UNKNOWN = 20
"""Token of X and of the ambiguous or rare residues B, J, O, U, Z."""
GAP = 21
MASK = 22
VOCABULARY = AMINO_ACIDS + "X-#"
VOCABULARY_SIZE = len(VOCABULARY)

INVALID = 255
"""What `TOKEN_OF_BYTE` gives for a byte that no alignment may contain."""


def _token_of_byte() -> np.ndarray:
    table = np.full(256, INVALID, dtype=np.uint8)
    for token, letter in enumerate(AMINO_ACIDS):
        table[[ord(letter), ord(letter.lower())]] = token
    for letter in "XBJOUZ":
        table[[ord(letter), ord(letter.lower())]] = UNKNOWN
    for character in "-._~":
        table[ord(character)] = GAP
    return table


TOKEN_OF_BYTE = _token_of_byte()


def encode(row: str) -> np.ndarray:
    """Letters of one aligned sequence -> uint8 tokens, `INVALID` where a character is no residue and no gap."""
    return TOKEN_OF_BYTE[np.frombuffer(row.encode("latin-1", "replace"), dtype=np.uint8)]


def decode(tokens: np.ndarray) -> str:
    """Tokens -> letters, '-' for a gap and '#' for a masked position."""
    return "".join(VOCABULARY[token] for token in tokens)

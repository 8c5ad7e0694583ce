# SPDX-License-Identifier: Apache-2.0
"""Nucleotides as small numbers.

A, C, G, T are 0..3; U is read as T. Lower case, which marks repeats in some files, means the same as upper case. The
ambiguity codes of IUPAC (N, R, Y, ...) are all AMBIGUOUS. Anything else, gaps included, is no nucleotide.
"""

import numpy as np

NUCLEOTIDES = "ACGT"
AMBIGUOUS = 4
INVALID = 255

_IUPAC_AMBIGUOUS = "NRYSWKMBDHV"
SPACE = b" \t\r\n"
"""Bytes that are left out of sequences."""


def _code_of_byte() -> bytes:
    table = bytearray([INVALID]) * 256
    pairs = [(letter, code) for code, letter in enumerate(NUCLEOTIDES)]
    pairs += [("U", NUCLEOTIDES.index("T")), *((letter, AMBIGUOUS) for letter in _IUPAC_AMBIGUOUS)]
    for letter, code in pairs:
        table[ord(letter)] = table[ord(letter.lower())] = code
    return bytes(table)


CODE_OF_BYTE = _code_of_byte()


def encode(text: bytes) -> np.ndarray:
    """Letters -> uint8 codes, white space left out, INVALID where a byte is no nucleotide."""
    return np.frombuffer(text.translate(CODE_OF_BYTE, SPACE), dtype=np.uint8)


def decode(codes: np.ndarray) -> str:
    """Codes -> upper-case letters, N for AMBIGUOUS."""
    return np.frombuffer((NUCLEOTIDES + "N").encode(), dtype=np.uint8)[codes].tobytes().decode()


def reverse_complement(codes: np.ndarray) -> np.ndarray:
    """The other strand, read in its own direction. uint8 [n] -> uint8 [n]."""
    return np.array([3, 2, 1, 0, AMBIGUOUS], dtype=np.uint8)[codes[::-1]]

# SPDX-License-Identifier: Apache-2.0
"""Streams nucleotide FASTA files in pieces of bounded size, however long their records and lines are.

The readers of biopython and pyfastx hold a whole record as a Python string, or an index beside the file, and report no
line numbers; a chromosome then takes several times its size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepspeed_ds4sci.data.files import damage_named, open_bytes
from deepspeed_ds4sci.data.genomes.nucleotides import INVALID, encode

BLOCK = 1 << 20
"""Bytes read at a time."""


@dataclass(frozen=True)
class Piece:
    """A part of a record: its pieces come one after another, the last one with `ends`, which may be empty."""

    name: str
    codes: np.ndarray
    """uint8 [n], see `nucleotides`."""
    ends: bool


def read_fasta(path: Path) -> Iterator[Piece]:
    """The records of a FASTA file, plain or gzip, in pieces of at most `BLOCK` nucleotides.

    Raises:
        ValueError: the file is empty or damaged, text before the first record, a record without name or sequence, or a
            character that is no nucleotide; the message gives file and line.
        OSError: the file cannot be opened.
    """
    scanner = _Scanner(path)
    with damage_named(path, lambda: scanner.line), open_bytes(path) as file:
        while block := file.read(BLOCK):
            yield from scanner.feed(block)
    yield from scanner.finish()


class _Scanner:
    """What is known between two blocks. `line` counts from 1."""

    def __init__(self, path: Path):
        self.path = path
        self.line = 1
        self.at_line_start = True
        self.header: bytes | None = None  # of a header line that the block did not end
        self.name: str | None = None
        self.name_line = 0
        self.length = 0

    def feed(self, block: bytes) -> Iterator[Piece]:
        at = 0
        while at < len(block):
            if self.header is None and self.at_line_start and block[at : at + 1] == b">":
                yield from self._end_record()
                self.header, self.name_line = b"", self.line
            if self.header is not None:
                at = self._header(block, at)
                continue
            following = block.find(b"\n>", at)
            stop = len(block) if following < 0 else following + 1
            yield from self._sequence(block[at:stop])
            at = stop

    def finish(self) -> Iterator[Piece]:
        if self.header is not None:  # the file ends in a header line
            self._name()
        if self.name is None:
            raise ValueError(f"{self.path}:1: the file is empty")
        yield from self._end_record()

    def _header(self, block, at):
        end = block.find(b"\n", at)
        self.header += block[at : len(block) if end < 0 else end]
        if end < 0:
            self.at_line_start = False
            return len(block)
        self._name()
        self.line += 1
        self.at_line_start = True
        return end + 1

    def _name(self):
        fields = self.header[1:].decode("utf-8", "replace").split(maxsplit=1)
        if not fields:
            raise ValueError(f"{self.path}:{self.name_line}: expected a name after '>', got none")
        self.name, self.header, self.length = fields[0], None, 0

    def _sequence(self, text):
        codes = encode(text)
        if self.name is None and codes.size:
            line = self.line + text[: len(text) - len(text.lstrip())].count(b"\n")
            raise ValueError(f"{self.path}:{line}: expected '>name', got {text.strip()[:40].decode('latin-1')!r}")
        if codes.size and codes.max() == INVALID:
            self._refuse(text)
        self.line += text.count(b"\n")
        self.at_line_start = text.endswith(b"\n")
        self.length += codes.size
        if codes.size:
            yield Piece(self.name, codes, False)

    def _refuse(self, text):
        for number, line in enumerate(text.split(b"\n"), self.line):
            bad = encode(line) == INVALID
            if bad.any():
                letter = b"".join(line.split())[int(bad.argmax())]
                raise ValueError(
                    f"{self.path}:{number}: {self.name!r} has {chr(letter)!r}, expected a nucleotide "
                    "(A, C, G, T, U or an ambiguity code)"
                )

    def _end_record(self):
        if self.name is None:
            return
        if not self.length:
            raise ValueError(f"{self.path}:{self.name_line}: {self.name!r} has no sequence")
        yield Piece(self.name, np.empty(0, dtype=np.uint8), True)

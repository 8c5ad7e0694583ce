# SPDX-License-Identifier: Apache-2.0
"""Reads GenBank flat files record by record: the sequence, and where its annotated coding sequences are.

Biopython's parser builds objects for every feature and gives no line numbers, so lines are scanned here; what a
location means (joins, complements, uncertain ends) is Biopython's to say.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deepspeed_ds4sci.data.files import numbered_lines
from deepspeed_ds4sci.data.genomes.nucleotides import CODE_OF_BYTE, INVALID, SPACE

_KEY_COLUMN, _TEXT_COLUMN = 5, 21  # of feature tables
_NUMBERS_AND_SPACE = b"0123456789" + SPACE


@dataclass(frozen=True)
class CodingFeature:
    """An annotated coding sequence, as the file has it."""

    location: str
    line: int
    codon_start: int = 1
    """Nucleotide, 1 to 3, at which the first whole codon starts."""
    pseudo: bool = False
    """Marked as not coding any more."""


@dataclass(frozen=True)
class GenomeRecord:
    """One record: `codes` is uint8 [n], see `nucleotides`."""

    name: str
    codes: np.ndarray
    features: tuple[CodingFeature, ...] = ()
    circular: bool = False


@dataclass
class _Open:
    """A record while it is read."""

    name: str
    line: int
    length: int
    circular: bool
    sequence: bytearray = field(default_factory=bytearray)
    features: list[CodingFeature] = field(default_factory=list)


def read_genbank(path: Path) -> Iterator[GenomeRecord]:
    """The records of a GenBank file, plain or gzip, one in memory at a time.

    Raises:
        ValueError: the file is empty, damaged or cut off, a record has no name, no sequence, another length than its
            LOCUS line says, misnumbered sequence lines or a character that is no nucleotide; the message gives file
            and line.
        OSError: the file cannot be opened.
    """
    lines = numbered_lines(path)
    number = 0
    found = False
    for number, line in lines:
        if not line:
            continue
        if not line.startswith("LOCUS"):
            raise ValueError(f"{path}:{number}: expected 'LOCUS', got {line[:40]!r}")
        found = True
        yield _record(path, _locus(path, number, line), lines)
    if not found:
        raise ValueError(f"{path}:{max(number, 1)}: the file is empty")


def _locus(path, number, line):
    fields = line.split()
    if len(fields) < 4 or not fields[2].isdigit() or fields[3] not in ("bp", "rc"):
        raise ValueError(f"{path}:{number}: expected 'LOCUS name length bp ...', got {line[:60]!r}")
    return _Open(fields[1], number, int(fields[2]), "circular" in fields[4:])


def _record(path, record, lines):
    section, number = "", record.line
    key: str | None = None  # of the feature in work
    parts: list[str] = []
    start = 0
    for number, line in lines:
        if line.startswith("//"):
            break
        if line[:1] not in ("", " "):
            section = line.split()[0]
            if key == "CDS":
                record.features.append(_coding_feature(path, start, parts))
            key = None
            if section == "LOCUS":
                raise ValueError(f"{path}:{number}: {record.name!r} of line {record.line} ends without '//'")
        elif section == "FEATURES":
            if line[_KEY_COLUMN : _KEY_COLUMN + 1].strip():
                if key == "CDS":
                    record.features.append(_coding_feature(path, start, parts))
                key, start, parts = line[_KEY_COLUMN:_TEXT_COLUMN].strip(), number, []
            if key == "CDS":
                parts.append(line[_TEXT_COLUMN:].strip())
        elif section == "ORIGIN" and line:
            _sequence_line(path, record, number, line)
    else:
        raise ValueError(f"{path}:{number}: {record.name!r} ends without '//'; is the file complete?")
    if not record.sequence:
        raise ValueError(f"{path}:{record.line}: {record.name!r} has no sequence (ORIGIN)")
    if len(record.sequence) != record.length:
        raise ValueError(
            f"{path}:{number}: {record.name!r} has {len(record.sequence)} nucleotides, expected {record.length} as "
            "its LOCUS line says"
        )
    codes = np.frombuffer(record.sequence, dtype=np.uint8)
    return GenomeRecord(record.name, codes, tuple(record.features), record.circular)


def _sequence_line(path, record, number, line):
    position, _, _ = line.strip().partition(" ")
    if position != str(len(record.sequence) + 1):
        following = len(record.sequence) + 1
        raise ValueError(
            f"{path}:{number}: expected sequence from nucleotide {following} on, got {line.strip()[:40]!r}"
        )
    letters = line.encode("utf-8")
    codes = letters.translate(CODE_OF_BYTE, _NUMBERS_AND_SPACE)
    bad = codes.find(INVALID)
    if bad >= 0:
        letter = letters.translate(None, _NUMBERS_AND_SPACE)[bad]
        raise ValueError(f"{path}:{number}: {record.name!r} has {chr(letter)!r}, expected a nucleotide")
    record.sequence += codes


def _coding_feature(path, line, parts):
    """Location and qualifiers of a CDS from the text of its lines."""
    qualifiers = next((i for i, part in enumerate(parts) if part.startswith("/")), len(parts))
    location = "".join(parts[:qualifiers]).replace(" ", "")
    if not location:
        raise ValueError(f"{path}:{line}: CDS without a location")
    codon_start, pseudo = 1, False
    for part in parts[qualifiers:]:
        name, _, value = part.partition("=")
        if name == "/codon_start":
            if value not in ("1", "2", "3"):
                raise ValueError(f"{path}:{line}: /codon_start must be 1, 2 or 3, got {value!r}")
            codon_start = int(value)
        pseudo |= name in ("/pseudo", "/pseudogene")
    return CodingFeature(location, line, codon_start, pseudo)

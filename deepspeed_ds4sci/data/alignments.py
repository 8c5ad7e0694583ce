# SPDX-License-Identifier: Apache-2.0
"""Reads protein alignments: Stockholm, A3M and aligned FASTA, plain or gzip-compressed.

Files are read line by line; only the tokens, one byte per aligned position, stay in memory. Whatever is wrong with a
file is a ValueError that starts with "path:line: ".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from deepspeed_ds4sci.data.alphabet import GAP, INVALID, encode
from deepspeed_ds4sci.data.files import numbered_lines

Format = Literal["stockholm", "a3m", "fasta"]

_Line = tuple[int, str]
_Record = tuple[int, str, str]  # line of the name, name, aligned row
# What HH-suite writes about the query among the sequences: secondary structure, solvent accessibility, confidence;
# numbered where several alignments were joined.
_HH_SUITE_ANNOTATION = re.compile("(ss|sa)_(pred|conf|dssp)(#[0-9]+)?")
_LOWERCASE_AND_DOT = str.maketrans("", "", "abcdefghijklmnopqrstuvwxyz.")


@dataclass(frozen=True)
class Alignment:
    """Aligned sequences. Immutable by convention: callers select, they do not write into `tokens`."""

    names: tuple[str, ...]
    tokens: np.ndarray
    """uint8 [n_seq, n_col], values of `alphabet`."""
    source: str
    """Where it was read from."""

    def drop_gappy_columns(self, max_gap_fraction: float = 0.5) -> "Alignment":
        """Keeps the columns in which at most this fraction of the sequences has a gap.

        Raises:
            ValueError: the fraction is not in [0, 1], or no column is left.
        """
        if not 0.0 <= max_gap_fraction <= 1.0:
            raise ValueError(f"max_gap_fraction must be in [0, 1], got {max_gap_fraction}")
        keep = (self.tokens == GAP).mean(axis=0) <= max_gap_fraction
        if not keep.any():
            raise ValueError(
                f"{self.source}: max_gap_fraction = {max_gap_fraction} leaves none of {self.tokens.shape[1]} columns"
            )
        return Alignment(self.names, self.tokens[:, keep], self.source)


def read_alignment(path: str | Path, format: Format | None = None) -> Alignment:
    """Reads one alignment.

    Args:
        path: the file; gzip is recognised by its content.
        format: None takes Stockholm from the first line ("# STOCKHOLM"), A3M from the suffix .a3m or .a3m.gz, and
            aligned FASTA otherwise.

    In A3M lower-case letters are insertions and are dropped, as are HH-suite's annotations of the query ("ss_pred",
    "ss_conf", "ss_dssp" and the same with "sa_"). In A3M and FASTA a name may be there more than once, as a database
    hit with two domains is: the second is called "name#2", the third "name#3"; a "*" at the end of a sequence and zero
    bytes between the alignments that ColabFold joins are dropped.

    Raises:
        ValueError: the file is empty, damaged, not in that format, has rows of different lengths, a character that is
            no residue and no gap, or in Stockholm a name twice or a second alignment; the message gives file and line.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    if format is not None and format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))} or None, got {format!r}")
    lines = numbered_lines(path)
    first = next(lines, None)
    while first is not None and not first[1]:
        first = next(lines, None)
    if first is None:
        raise ValueError(f"{path}:1: the file is empty")
    if format is None:
        format = _guess_format(path, first[1])
    parse = {"stockholm": _stockholm_records, "a3m": _a3m_records, "fasta": _fasta_records}[format]
    return _collect(path, parse(path, first, lines))


def _guess_format(path: Path, first_line: str) -> Format:
    if first_line.startswith("# STOCKHOLM"):
        return "stockholm"
    return "a3m" if path.name.removesuffix(".gz").endswith(".a3m") else "fasta"


def _stockholm_records(path: Path, first: _Line, lines: Iterator[_Line]) -> Iterator[_Record]:
    """Records of one Stockholm alignment, sequential or interleaved in blocks."""
    if not first[1].startswith("# STOCKHOLM"):
        raise ValueError(f"{path}:{first[0]}: expected '# STOCKHOLM 1.0', got {first[1][:40]!r}")
    parts: dict[str, list[str]] = {}
    name_lines: dict[str, int] = {}
    in_block: set[str] = set()
    number = first[0]
    closed = False
    for number, line in lines:
        if closed:
            if line:
                raise ValueError(f"{path}:{number}: expected one alignment, got a second one; split the file")
        elif line == "//":
            closed = True
        elif not line:
            in_block.clear()
        elif not line.startswith("#"):
            fields = line.split()
            if len(fields) != 2:
                raise ValueError(f"{path}:{number}: expected a name and an aligned row, got {len(fields)} fields")
            name, row = fields
            if name in in_block:
                raise ValueError(
                    f"{path}:{number}: the name {name!r} is there twice, first on line {name_lines[name]}"
                )
            in_block.add(name)
            name_lines.setdefault(name, number)
            parts.setdefault(name, []).append(row)
    if not closed:
        raise ValueError(f"{path}:{number}: the file ends without '//'; is it complete?")
    for name, rows in parts.items():
        yield name_lines[name], name, "".join(rows)


def _fasta_records(path: Path, first: _Line, lines: Iterator[_Line]) -> Iterator[_Record]:
    """Records of a FASTA file; rows may be wrapped."""
    if not first[1].startswith(">"):
        raise ValueError(f"{path}:{first[0]}: expected '>name', got {first[1][:40]!r}")
    times: dict[str, int] = {}
    for number, header, row in _headed_rows(first, lines):
        fields = header[1:].split(maxsplit=1)
        if not fields:
            raise ValueError(f"{path}:{number}: expected a name after '>', got none")
        yield number, _unused_name(fields[0], times), row.removesuffix("*")


def _headed_rows(first: _Line, lines: Iterator[_Line]) -> Iterator[_Record]:
    """(line of the header, header, row) of a FASTA file."""
    header_line, header = first
    rows: list[str] = []
    for number, line in lines:
        line = line.strip("\0")
        if line.startswith(">"):
            yield header_line, header, "".join(rows)
            header_line, header, rows = number, line, []
        else:
            rows.append(line.replace(" ", ""))
    yield header_line, header, "".join(rows)


def _unused_name(name: str, times: dict[str, int]) -> str:
    """`name`, with a number if it was there before. `times` counts the names used so far."""
    unused = name
    while unused in times:
        times[name] += 1
        unused = f"{name}#{times[name]}"
    times[unused] = 1
    return unused


def _a3m_records(path: Path, first: _Line, lines: Iterator[_Line]) -> Iterator[_Record]:
    """FASTA records without annotations and insertions (lower-case letters, dots). A leading '#' line is a comment."""
    while first is not None and (first[1].startswith("#") or not first[1]):
        comment, first = first, next(lines, None)
        if first is None:
            raise ValueError(f"{path}:{comment[0]}: no sequences after the comments")
    for number, name, row in _fasta_records(path, first, lines):
        if not _HH_SUITE_ANNOTATION.fullmatch(name):
            yield number, name, row.translate(_LOWERCASE_AND_DOT)


def _collect(path: Path, records: Iterator[_Record]) -> Alignment:
    """Checks and tokenises records as they come."""
    names: list[str] = []
    rows: list[np.ndarray] = []
    for number, name, row in records:
        tokens = encode(row)
        bad = np.flatnonzero(tokens == INVALID)
        if bad.size:
            raise ValueError(
                f"{path}:{number}: {name!r} has {row[bad[0]]!r} at column {bad[0] + 1}, "
                "expected a residue letter or a gap"
            )
        if not tokens.size:
            raise ValueError(f"{path}:{number}: {name!r} has no sequence")
        if rows and tokens.size != rows[0].size:
            raise ValueError(
                f"{path}:{number}: {name!r} has {tokens.size} columns, expected {rows[0].size} as {names[0]!r} has"
            )
        names.append(name)
        rows.append(tokens)
    if not rows:
        raise ValueError(f"{path}:1: no sequences in the file")
    return Alignment(tuple(names), np.stack(rows), str(path))

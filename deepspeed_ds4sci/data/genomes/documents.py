# SPDX-License-Identifier: Apache-2.0
"""From a genome file to a stream of tokens with document boundaries, and on to windows of one length.

A document is a record of the file, or a coding sequence: [CLS], its tokens, [SEP]. A document longer than the window
goes on in the next one; a window that ends before its documents do has no [SEP] there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from deepspeed_ds4sci.data.files import numbered_lines
from deepspeed_ds4sci.data.genomes.fasta import BLOCK, Piece, read_fasta
from deepspeed_ds4sci.data.genomes.genbank import GenomeRecord, read_genbank
from deepspeed_ds4sci.data.genomes.genes import annotated_genes, called_genes
from deepspeed_ds4sci.data.genomes.tokenizer import CLS, PAD, SEP, GenomeTokenizer

Sequences = Literal["genome", "annotated", "called", "genes"]
"""genome: whole records, codons read from their first nucleotide on. annotated: the coding sequences of a GenBank
file. called: coding sequences found by pyrodigal. genes: annotated in a GenBank file, called in FASTA."""

NO_DOCUMENT = -1


@dataclass(frozen=True)
class TokenPiece:
    """A stretch of one document; the pieces of a document come one after another."""

    tokens: np.ndarray
    """uint8 [n], special tokens included."""
    starts: bool
    """It is the first of its document."""


@dataclass(frozen=True)
class Window:
    """tokens: uint8 [context], [PAD] at the end where the file had no more.
    documents: int32 [context], which document of this window a token is in, from 0; NO_DOCUMENT for padding."""

    tokens: np.ndarray
    documents: np.ndarray

    def reverse_complement(self, tokenizer: GenomeTokenizer) -> "Window":
        """Each document's stretch on the other strand, in place."""
        tokens = self.tokens.copy()
        edges = np.flatnonzero(np.diff(self.documents)) + 1
        for start, stop in zip([0, *edges], [*edges, len(tokens)], strict=True):
            if self.documents[start] != NO_DOCUMENT:
                tokens[start:stop] = tokenizer.reverse_complement(self.tokens[start:stop])
        return Window(tokens, self.documents)


def is_genbank(path: Path) -> bool:
    """Whether the first line with text is a LOCUS line.

    Raises:
        ValueError: the file is empty or damaged.
        OSError: it cannot be opened.
    """
    with_text = next((line for _, line in numbered_lines(path) if line), None)
    if with_text is None:
        raise ValueError(f"{path}:1: the file is empty")
    return with_text.startswith("LOCUS")


def read_records(path: Path) -> Iterator[GenomeRecord]:
    """Whole records of a FASTA or GenBank file, one in memory at a time. Raises as `read_fasta` and `read_genbank`."""
    if is_genbank(path):
        yield from read_genbank(path)
        return
    codes = bytearray()
    for piece in read_fasta(path):
        codes += piece.codes.data
        if piece.ends:
            yield GenomeRecord(piece.name, np.frombuffer(codes, dtype=np.uint8))
            codes = bytearray()


def token_pieces(path: Path, tokenizer: GenomeTokenizer, sequences: Sequences) -> Iterator[TokenPiece]:
    """The documents of a file. Whole FASTA records are streamed; else one record is in memory at a time.

    Raises:
        ValueError: another value of `sequences`, "annotated" for a file that is not GenBank or has no coding sequence,
            "called" where no gene is found, or a malformed file; the message gives file and line.
    """
    if sequences not in get_args(Sequences):
        raise ValueError(f"sequences must be one of {', '.join(get_args(Sequences))}, got {sequences!r}")
    genbank = is_genbank(path)
    if sequences == "genome":
        yield from _streamed(_genbank_pieces(path) if genbank else read_fasta(path), tokenizer)
        return
    if sequences == "genes":
        sequences = "annotated" if genbank else "called"
    if sequences == "annotated" and not genbank:
        raise ValueError(f'{path}:1: sequences = "annotated" needs a GenBank file, got FASTA; use "called"')
    found = False
    for record in read_records(path):
        for gene in annotated_genes(str(path), record) if sequences == "annotated" else called_genes(record):
            found = True
            yield _document(tokenizer.encode(gene))
    if not found:
        raise ValueError(f"{path}:1: no coding sequence is {sequences}")


def _document(tokens):
    ends = np.array([CLS], dtype=np.uint8), np.array([SEP], dtype=np.uint8)
    return TokenPiece(np.concatenate([ends[0], tokens, ends[1]]), True)


def _genbank_pieces(path):
    for record in read_genbank(path):
        for start in range(0, len(record.codes), BLOCK):
            yield Piece(record.name, record.codes[start : start + BLOCK], start + BLOCK >= len(record.codes))


def _streamed(pieces, tokenizer):
    """Tokens of whole records; nucleotides that fill no token yet are carried on to the next piece."""
    rest = np.empty(0, dtype=np.uint8)
    starts = True
    for piece in pieces:
        codes = np.concatenate([rest, piece.codes]) if rest.size else piece.codes
        whole = len(codes) // tokenizer.word_length * tokenizer.word_length
        rest = codes[whole:]
        tokens = tokenizer.encode(codes[:whole])
        head = [np.array([CLS], dtype=np.uint8)] if starts else []
        tail = [np.array([SEP], dtype=np.uint8)] if piece.ends else []
        yield TokenPiece(np.concatenate([*head, tokens, *tail]), starts)
        starts = piece.ends
        if piece.ends:
            rest = rest[:0]


def cut_windows(pieces: Iterator[TokenPiece], context: int, packed: bool) -> Iterator[Window]:
    """Windows of `context` tokens. Packed: documents follow each other without gaps; else each starts a window."""
    window = _filled(context)
    filled, document = 0, NO_DOCUMENT
    for piece in pieces:
        if piece.starts and filled and not packed:
            yield window
            window, filled, document = _filled(context), 0, NO_DOCUMENT
        document += piece.starts or filled == 0  # what goes on from the window before counts from 0 too
        tokens = piece.tokens
        while len(tokens):
            if filled == context:
                yield window
                window, filled, document = _filled(context), 0, 0
            taken = min(context - filled, len(tokens))
            window.tokens[filled : filled + taken] = tokens[:taken]
            window.documents[filled : filled + taken] = document
            filled += taken
            tokens = tokens[taken:]
    if filled:
        yield window


def _filled(context):
    return Window(np.full(context, PAD, dtype=np.uint8), np.full(context, NO_DOCUMENT, dtype=np.int32))

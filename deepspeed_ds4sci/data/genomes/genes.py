# SPDX-License-Identifier: Apache-2.0
"""Coding sequences of a record: annotated ones, or called by pyrodigal (Prodigal's gene finder) in a raw genome."""

import logging
import warnings
import zlib
from collections.abc import Iterator

import numpy as np

from deepspeed_ds4sci.data.genomes import nucleotides
from deepspeed_ds4sci.data.genomes.genbank import CodingFeature, GenomeRecord

logger = logging.getLogger(__name__)

_TRAINING_LENGTH = 20_000  # nucleotides; Prodigal cannot be trained on less


def annotated_genes(path: str, record: GenomeRecord) -> Iterator[np.ndarray]:
    """The coding sequences that the file annotates, on their own strand and in frame.

    Left out: those marked as pseudo, and those of which a part is in another record. Needs biopython.

    Returns:
        uint8 [n] codes each, from the first whole codon on; at the end up to two nucleotides may be left over.

    Raises:
        ValueError: a location that cannot be read or is outside of the record; the message gives file and line.
        ImportError: biopython is missing.
    """
    left_out = 0
    for feature in record.features:
        codes = None if feature.pseudo else _extract(path, record, feature)
        if codes is None:
            left_out += 1
        else:
            yield codes[feature.codon_start - 1 :]
    if left_out:
        logger.info("%s: %s: %d pseudo or remote coding sequences left out", path, record.name, left_out)


def _extract(path, record, feature: CodingFeature):
    try:
        from Bio.SeqFeature import Location, LocationParserError
    except ImportError as error:
        raise ImportError(
            'annotated genes need biopython: pip install "deepspeed_ds4sci[genomes]"', name=error.name
        ) from error
    length = len(record.codes)
    where = f"{path}:{feature.line}: CDS {feature.location}"
    try:
        location = Location.fromstring(feature.location, length=length, circular=record.circular)
    except (LocationParserError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: not a location ({error})") from error
    pieces = []
    for part in location.parts:
        if part.ref is not None:
            return None
        start, end = int(part.start), int(part.end)
        if not 0 <= start < end <= length:
            raise ValueError(f"{where}: outside of the {length} nucleotides of {record.name!r}")
        codes = record.codes[start:end]
        pieces.append(nucleotides.reverse_complement(codes) if part.strand == -1 else codes)
    return np.concatenate(pieces)


def called_genes(record: GenomeRecord) -> Iterator[np.ndarray]:
    """The coding sequences that Prodigal finds, in order along the record, on their own strand and in frame.

    Prodigal learns from a record of 20,000 nucleotides or more, and uses its models of known genomes for a shorter
    one. It is made for bacteria, archaea and their phages: genes with introns are not found. Needs pyrodigal, and
    about 40 bytes of memory per nucleotide of the record. What was found is remembered, 12 bytes per gene, since a
    stream reads its files again and again and finding takes seconds.

    Raises:
        ImportError: pyrodigal is missing.
    """
    key = record.name, len(record.codes), zlib.crc32(record.codes)
    if key not in _found:
        _found[key] = _find(record)
    for begin, end, strand in _found[key]:
        codes = record.codes[begin - 1 : end]
        yield nucleotides.reverse_complement(codes) if strand == -1 else codes


_found: dict[tuple, np.ndarray] = {}


def _find(record: GenomeRecord) -> np.ndarray:
    """int32 [genes, 3]: first and last nucleotide, counted from 1, and strand."""
    try:
        import pyrodigal
    except ImportError as error:
        raise ImportError(
            'calling genes needs pyrodigal: pip install "deepspeed_ds4sci[genomes]"', name=error.name
        ) from error
    text = nucleotides.decode(record.codes)
    alone = len(text) >= _TRAINING_LENGTH
    finder = pyrodigal.GeneFinder(meta=not alone)
    if alone:
        with warnings.catch_warnings():  # that 100,000 would be better
            warnings.filterwarnings("ignore", "sequence should be at least", UserWarning)
            finder.train(text)
    genes = [(gene.begin, gene.end, gene.strand) for gene in finder.find_genes(text)]
    return np.array(genes, dtype=np.int32).reshape(-1, 3)

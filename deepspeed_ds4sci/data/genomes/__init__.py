# SPDX-License-Identifier: Apache-2.0
"""Genomes as token streams: FASTA and GenBank readers, codon tokens, windows, baselines."""

from deepspeed_ds4sci.data.genomes.dataset import IGNORE, GenomeDataConfig, GenomeDataset
from deepspeed_ds4sci.data.genomes.documents import Window, read_records
from deepspeed_ds4sci.data.genomes.markov import CodonFrequencies, NucleotideMarkov
from deepspeed_ds4sci.data.genomes.tokenizer import CODONS, SINGLE_NUCLEOTIDES, TOKENIZERS, GenomeTokenizer

__all__ = [
    "CODONS",
    "IGNORE",
    "SINGLE_NUCLEOTIDES",
    "TOKENIZERS",
    "CodonFrequencies",
    "GenomeDataConfig",
    "GenomeDataset",
    "GenomeTokenizer",
    "NucleotideMarkov",
    "Window",
    "read_records",
]

# SPDX-License-Identifier: Apache-2.0
"""Protein alignments: parsers, splits, masked-MSA examples. Genomes are in `data.genomes`."""

from deepspeed_ds4sci.data.alignments import Alignment, read_alignment
from deepspeed_ds4sci.data.masked_msa import (
    AF2_MASKING,
    HeldOutExamples,
    MaskedMSADataset,
    Masking,
    column_profile,
    hide_residues,
)
from deepspeed_ds4sci.data.split import split_held_out

__all__ = [
    "AF2_MASKING",
    "Alignment",
    "HeldOutExamples",
    "MaskedMSADataset",
    "Masking",
    "column_profile",
    "hide_residues",
    "read_alignment",
    "split_held_out",
]

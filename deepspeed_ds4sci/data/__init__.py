# SPDX-License-Identifier: Apache-2.0
"""Protein alignments: parsers, splits, masked-MSA examples. Genomes are in `data.genomes`. And a sampler that resumes,
for any data."""

from deepspeed_ds4sci.data.alignments import Alignment, read_alignment
from deepspeed_ds4sci.data.masked_msa import (
    AF2_MASKING,
    HeldOutExamples,
    MaskedMSADataset,
    Masking,
    column_profile,
    hide_residues,
)
from deepspeed_ds4sci.data.resumable import ResumableSampler
from deepspeed_ds4sci.data.split import split_held_out

__all__ = [
    "AF2_MASKING",
    "Alignment",
    "HeldOutExamples",
    "MaskedMSADataset",
    "Masking",
    "ResumableSampler",
    "column_profile",
    "hide_residues",
    "read_alignment",
    "split_held_out",
]

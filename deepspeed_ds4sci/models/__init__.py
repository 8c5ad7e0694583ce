# SPDX-License-Identifier: Apache-2.0
"""Genome language models: GenSLM-style decoders and their published sizes."""

from deepspeed_ds4sci.models.configs import NAMED_CONFIGS, GenSLMConfig
from deepspeed_ds4sci.models.genslm import GenSLM, GenSLMOutput, shift_labels

__all__ = ["NAMED_CONFIGS", "GenSLM", "GenSLMConfig", "GenSLMOutput", "shift_labels"]

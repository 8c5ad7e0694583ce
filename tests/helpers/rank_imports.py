# SPDX-License-Identifier: Apache-2.0
"""What the process imports that CPU ranks of distributed.py are forked from: all that more than one launch needs."""

import contextlib
import gc

# It compiles a function at import, for which torch imports its compiler, and ZeRO imports it for every engine.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

from deepspeed_ds4sci.training import prepare_cpu
from tests.helpers import timm_models

with contextlib.suppress(ImportError):
    from transformers import (  # noqa: F401
        EsmForMaskedLM,
        GPT2LMHeadModel,
        GPTNeoXForCausalLM,
        LlamaForCausalLM,
        ViTForImageClassification,
    )

if timm_models.INSTALLED:
    timm_models.load()

# Asks DeepSpeed which of its ops it could compile, once for all ranks, and does without one that training never calls.
prepare_cpu()

# Collections in the ranks, of which ZeRO asks for some per engine, need not look at all that was imported.
gc.freeze()

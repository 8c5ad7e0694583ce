# SPDX-License-Identifier: Apache-2.0
"""What a `ds4sci` block does to the model and the engine: one hook per feature, in the order of HOOKS.

A hook reads its own part of the block, changes what it says it changes, and reports it. `engine.py` runs the hooks
around DeepSpeed's engine.
"""

from deepspeed_ds4sci.hooks.activation_checkpointing import ActivationCheckpointingHook
from deepspeed_ds4sci.hooks.attention import AttentionHook
from deepspeed_ds4sci.hooks.attention_mask import AttentionMaskHook
from deepspeed_ds4sci.hooks.context import Change, Hook, HookContext
from deepspeed_ds4sci.hooks.position_embedding import PositionEmbeddingHook
from deepspeed_ds4sci.hooks.sequence_parallel import SequenceParallelHook
from deepspeed_ds4sci.hooks.tiling import TilingHook

HOOKS: tuple[Hook, ...] = (
    SequenceParallelHook(),
    AttentionHook(),
    PositionEmbeddingHook(),
    AttentionMaskHook(),
    ActivationCheckpointingHook(),
    TilingHook(),
)

__all__ = ["HOOKS", "Change", "Hook", "HookContext"]

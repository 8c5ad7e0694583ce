# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of engines with a `ds4sci` block: one state dict of the whole model, and other layouts.

    python -m deepspeed_ds4sci.checkpoint export DIR OUT         # a Hugging Face-style state dict, in fp32
    python -m deepspeed_ds4sci.checkpoint universal DIR/TAG      # for another ZeRO stage, 0 to 3, or number of ranks

`whole_state_dict(engine)` gives the state dict while training runs.
"""

from deepspeed_ds4sci.checkpoint.export import export, exported_state_dict
from deepspeed_ds4sci.checkpoint.universal import to_universal

__all__ = ["export", "exported_state_dict", "to_universal", "whole_state_dict"]


def whole_state_dict(engine):
    """See `deepspeed_ds4sci.hooks.whole_table.whole_state_dict`."""
    from deepspeed_ds4sci.hooks.whole_table import whole_state_dict

    return whole_state_dict(engine)

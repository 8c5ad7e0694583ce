# SPDX-License-Identifier: Apache-2.0
"""Reading, checking and explaining the `ds4sci` block of a DeepSpeed config.

`read_block` types it, `check_combinations` refuses what cannot work together, and
`python -m deepspeed_ds4sci.config check FILE` does both and explains the result.
"""

from deepspeed_ds4sci.config.combinations import check_combinations
from deepspeed_ds4sci.config.read import BLOCK, load_file, read_block
from deepspeed_ds4sci.config.schema import DS4SciConfig

__all__ = ["BLOCK", "DS4SciConfig", "check_combinations", "load_file", "read_block"]

# SPDX-License-Identifier: Apache-2.0
"""What training scripts under the `deepspeed` launcher share: their log, their configuration, memory, FLOP counts."""

from deepspeed_ds4sci.training.flops import PeakFlops, forward_flops, peak_flops, step_flops
from deepspeed_ds4sci.training.launch import (
    count_parameters,
    load_config,
    peak_memory,
    prepare_cpu,
    refresh_seconds,
    resume,
    seed_step,
)
from deepspeed_ds4sci.training.runlog import RunLog, read_log, running_mean

__all__ = [
    "PeakFlops",
    "RunLog",
    "count_parameters",
    "forward_flops",
    "load_config",
    "peak_flops",
    "peak_memory",
    "prepare_cpu",
    "read_log",
    "refresh_seconds",
    "resume",
    "running_mean",
    "seed_step",
    "step_flops",
]

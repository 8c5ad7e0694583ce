# SPDX-License-Identifier: Apache-2.0
"""The portable CUDA implementation: mma.sync kernels for every NVIDIA GPU from compute capability 8.0 on."""

import torch

from ._dispatch import Missing
from ._extension import extension, missing_reason

MIN_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# One thread block handles a tile of one (row, head); blocks are numbered on one grid axis.
_MAX_BLOCKS = 2**31 - 1
_SMALLEST_TILE = 32


class _SM80:
    name = "sm80"

    def unsupported_reason(self, problem) -> str | None:
        if problem.device_type != "cuda":
            return f"needs a CUDA device, got {problem.device_type}"
        if problem.capability < MIN_CAPABILITY:
            return "needs compute capability {}.{} or newer, got {}.{}".format(*MIN_CAPABILITY, *problem.capability)
        if problem.dtype not in DTYPES:
            return f"takes fp16, bf16 and fp32, got {problem.dtype}"
        if problem.head_dim > MAX_HEAD_DIM:
            return f"takes head_dim up to {MAX_HEAD_DIM}, got {problem.head_dim}"
        longest = max(problem.q_len, problem.k_len)
        blocks = -(-longest // _SMALLEST_TILE) * problem.heads * problem.batch * problem.rows
        if blocks > _MAX_BLOCKS:
            return f"takes up to {_MAX_BLOCKS} thread blocks, {blocks} needed"
        missing = missing_reason(self.name)
        return None if missing is None else Missing(missing)

    def forward(self, q, k, v, mask_bias, pair_bias, gate, softmax_scale):
        return extension().forward(q, k, v, mask_bias, pair_bias, gate, softmax_scale)

    def backward(self, do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, wanted):
        return extension().backward(do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, wanted)


SM80 = _SM80()

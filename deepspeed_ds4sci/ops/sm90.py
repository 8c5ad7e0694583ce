# SPDX-License-Identifier: Apache-2.0
"""The Hopper implementation: wgmma kernels fed by the copy engine, for compute capability 9.0 alone."""

import torch

from ._dispatch import Missing
from ._extension import extension, missing_reason

CAPABILITY = (9, 0)  # the kernels are compiled for sm_90a, which runs nowhere else
MAX_HEAD_DIM = 64
DTYPES = (torch.float16, torch.bfloat16)
# The kernels multiply by the scale what they divided by it before: mask, lse, and -1e38 for a dropped key, which must
# stay below what the online softmax takes for a logit, -1e30.
MIN_SCALE, MAX_SCALE = 1e-7, 1e20
# Blocks step through numbered work items by the size of the grid; two steps past the last one must fit in 32 bits.
_MAX_ITEMS = 2**31 - 2**16
_QUERIES_PER_ITEM = 128
_ROWS_PER_ITEM = 2  # at least
_KEYS_PER_ITEM = 64  # of one row


def _work_items(problem) -> int:
    """As many as the kernel with the most has, or more."""
    groups = problem.batch * problem.rows // problem.rows_sharing_bias
    row_blocks = groups * -(-problem.rows_sharing_bias // _ROWS_PER_ITEM)
    of_queries = -(-problem.q_len // _QUERIES_PER_ITEM) * row_blocks
    of_keys = -(-problem.k_len // _KEYS_PER_ITEM) * problem.batch * problem.rows
    return max(of_queries, of_keys) * problem.heads


class _SM90:
    name = "sm90"

    def unsupported_reason(self, problem) -> str | None:
        if problem.device_type != "cuda":
            return f"needs a CUDA device, got {problem.device_type}"
        if problem.capability != CAPABILITY:
            return "needs compute capability {}.{} (Hopper), got {}.{}".format(*CAPABILITY, *problem.capability)
        if problem.dtype not in DTYPES:
            return f"takes fp16 and bf16, got {problem.dtype}"
        if problem.head_dim > MAX_HEAD_DIM:
            return f"takes head_dim up to {MAX_HEAD_DIM}, got {problem.head_dim}"
        if problem.pair_dtype not in (None, problem.dtype):
            return f"takes a pair bias of q's dtype {problem.dtype}, got {problem.pair_dtype}"
        if not MIN_SCALE <= problem.softmax_scale <= MAX_SCALE:  # also NaN
            return f"takes softmax_scale from {MIN_SCALE:g} to {MAX_SCALE:g}, got {problem.softmax_scale:g}"
        items = _work_items(problem)
        if items > _MAX_ITEMS:
            return f"takes up to {_MAX_ITEMS} work items, {items} needed"
        missing = missing_reason(self.name)
        return None if missing is None else Missing(missing)

    def forward(self, q, k, v, mask_bias, pair_bias, gate, softmax_scale):
        return extension().forward(q, k, v, mask_bias, pair_bias, gate, softmax_scale, self.name)

    def backward(self, do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, wanted):
        return extension().backward(do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, wanted, self.name)


SM90 = _SM90()

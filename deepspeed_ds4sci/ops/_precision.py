# SPDX-License-Identifier: Apache-2.0
"""Products of torch inside the op keep their dtype, whatever the caller's settings are."""

import functools
from contextlib import contextmanager, nullcontext

import torch

_TRUE_FP32 = ("none", "ieee")


def own_precision(device_type: str):
    """A context without autocast (backward() may run inside it) and without TF32 or bf16 for fp32 products."""
    matmul = torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul
    if matmul.fp32_precision in _TRUE_FP32 and not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return _enforced_precision(device_type, matmul)


@contextmanager
def _enforced_precision(device_type: str, matmul):
    allowed = matmul.fp32_precision
    if allowed not in _TRUE_FP32:
        matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if allowed not in _TRUE_FP32:
            _restore(matmul, allowed)


def _restore(matmul, allowed: str) -> None:
    """Inherits `allowed` from torch.backends or the backend where that gives it, so that a later change there counts.

    torch does not tell an inherited value from an own one; one that equals the inherited is taken for inherited.
    """
    matmul.fp32_precision = "none"
    if matmul.fp32_precision != allowed:
        matmul.fp32_precision = allowed


def in_own_precision(method):
    """For methods of implementations that multiply with torch; their first argument is a tensor."""

    @functools.wraps(method)
    def wrapped(self, tensor, *args):
        with own_precision(tensor.device.type):
            return method(self, tensor, *args)

    return wrapped

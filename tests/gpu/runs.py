# SPDX-License-Identifier: Apache-2.0
"""The compiled implementations, each with the dtypes it takes, as parameters of the tests in this folder; and what
several of these share."""

from collections.abc import Iterable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from deepspeed_ds4sci.ops import sm80, sm90
from tests.helpers.inputs import AttentionInputs, make_inputs
from tests.helpers.numerics import run_op
from tests.helpers.shapes import AttentionShape

MAX_HEAD_DIM = {"sm80": sm80.MAX_HEAD_DIM, "sm90": sm90.MAX_HEAD_DIM}
_IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == sm90.CAPABILITY
_MARKS = {
    "sm80": (),
    "sm90": pytest.mark.skipif(not _IS_HOPPER, reason="sm90 needs a GPU of compute capability 9.0"),
}

ON_HOPPER = _MARKS["sm90"]
IMPLEMENTATIONS = [pytest.param(name, marks=mark) for name, mark in _MARKS.items()]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_RUNS = [("sm80", dtype) for dtype in _DTYPES] + [("sm90", dtype) for dtype in _DTYPES if dtype in sm90.DTYPES]


def _param(*values):
    words = [str(value).removeprefix("torch.") for value in values]
    return pytest.param(*values, marks=[mark for value in values if (mark := _MARKS.get(value))], id="-".join(words))


RUNS = [_param(*run) for run in _RUNS]
RUNS_16_BIT = [_param(*run) for run in _RUNS if run[1] != torch.float32]


def with_shapes(shapes: Iterable) -> list:
    """(shape, implementation, dtype) for all that the implementations take."""
    return [_param(shape, *run) for shape in shapes for run in _RUNS if shape.head_dim <= MAX_HEAD_DIM[run[0]]]


def with_head_dims(head_dims: Iterable[int]) -> list:
    """(head_dim, implementation, 16-bit dtype) for all that the implementations take."""
    runs = [run for run in _RUNS if run[1] != torch.float32]
    return [_param(dim, *run) for dim in head_dims for run in runs if dim <= MAX_HEAD_DIM[run[0]]]


def launches(inputs: AttentionInputs, kernel: str) -> int:
    """How many kernels with `kernel` in their name a forward and a backward pass on Hopper launch."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_op(inputs, "sm90")
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if kernel in event.key)


def with_masked_maximum(shape: AttentionShape, value: float, dtype: torch.dtype, seed: int = 0) -> AttentionInputs:
    """Inputs whose largest pair bias is `value`, at a key that every second row drops."""
    inputs = make_inputs(shape, dtype, "cuda", mask="minus_inf", seed=seed)
    with torch.no_grad():
        inputs.pair_bias[..., 77] = value
        inputs.mask_bias[:, ::2, ..., 77] = float("-inf")
        inputs.mask_bias[:, 1::2, ..., 77] = 0.0
    return inputs

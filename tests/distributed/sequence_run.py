# SPDX-License-Identifier: Apache-2.0
"""One launch per world size for all checks of the sequence package: starting ranks costs more than most checks."""

import functools
import importlib

import torch

from tests.helpers.distributed import run_distributed

CHECKED = ("attention", "position_table", "model")


def check_all():
    """{part: what that part's `checks` found} on this rank."""
    # Fresh tensors hold NaN: an element that no rank sent is noticed.
    torch.use_deterministic_algorithms(True, warn_only=True)
    return {part: importlib.import_module(f"tests.distributed.test_sequence_{part}").checks() for part in CHECKED}


@functools.cache
def results(world_size: int) -> list[dict]:
    """What `check_all` found on each rank."""
    return run_distributed(check_all, world_size)

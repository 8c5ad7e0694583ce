# SPDX-License-Identifier: Apache-2.0
"""Settings of every test: fixed seed, NaN-filled memory, one thread, GPU tests skipped where there is no GPU."""

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU of compute capability 8.0 or newer")
    config.addinivalue_line("markers", "distributed(world_size): starts this many processes")
    config.addinivalue_line("markers", "slow: takes more than about 30 seconds")
    # Tests compute little at a time. Threads gain nothing there, and cost a lot beside other work on the same cores.
    torch.set_num_threads(1)


def _gpu_is_missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the CUDA GPU is older than compute capability 8.0"
    return None


def pytest_collection_modifyitems(items):
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    reason = _gpu_is_missing() if gpu_items else None
    if reason is not None:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Fresh tensors hold NaN, so that an output element nobody wrote fails the test that reads it."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill

# SPDX-License-Identifier: Apache-2.0
"""One thread: the tensors are tiny, and waking a second thread for each operation more than doubles the time."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

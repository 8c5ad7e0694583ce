# SPDX-License-Identifier: Apache-2.0
"""ZeRO stage 3 with optimizer states in files (`"device": "nvme"`), split sequences and a sharded table: same bits.

Runs where DeepSpeed's op async_io is built: that needs libaio's headers, and a quarter of an hour on two cores.
"""

from pathlib import Path

import pytest

from tests.distributed.nvme_worker import offloaded
from tests.helpers.distributed import run_distributed

LIMIT_OF_TWO_CLIPPED_STEPS = 1e-5  # of the tensor's largest value


def reason_to_skip():
    """Why async_io cannot be used without compiling it first; "" where it can."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder
    from torch.utils import cpp_extension

    if not AsyncIOBuilder().is_compatible(verbose=False):
        return "DeepSpeed's async_io needs libaio (Debian: libaio-dev)"
    built = Path(cpp_extension._get_build_directory("async_io", False)) / "async_io.so"
    if installed_ops.get("async_io") or built.exists():
        return ""
    return "DeepSpeed's async_io is not built; deepspeed.ops.op_builder.cpu.AsyncIOBuilder().load() builds it"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if reason := reason_to_skip():
        pytest.skip(reason)
    return run_distributed(offloaded, 2, str(tmp_path_factory.mktemp("nvme")), timeout=600)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("clipping", [0.0, 0.5])
@pytest.mark.parametrize("what", ["optimizer", "optimizer and parameters"])
def test_trains_as_without_files(results, what, clipping):
    for found in results:
        different, distance, folders = found[what, clipping]
        assert (
            different == []
        )  # from offload to CPU memory, whose norm DeepSpeed adds up in another order than without
        assert distance <= (LIMIT_OF_TWO_CLIPPED_STEPS if clipping else 0.0)
        assert {"optimizer", "rank0", "rank1"} <= set(folders)  # of optimizer states that were swapped out

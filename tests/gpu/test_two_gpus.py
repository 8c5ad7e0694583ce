# SPDX-License-Identifier: Apache-2.0
"""Sequences split over two GPUs with NCCL: the training of one rank, an unchanged script, and exact resume."""

import pytest
import torch

from tests.benchmarks.two_gpus.equality import CASES, LIMIT
from tests.distributed import checkpoint_worker
from tests.distributed.engine_worker import run_cases
from tests.distributed.test_engine_launcher import check_an_unchanged_script
from tests.helpers.distributed import run_distributed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two GPUs, found {torch.cuda.device_count()}"),
]


@pytest.fixture(scope="module")
def trained():
    return run_distributed(run_cases, 2, CASES, backend="nccl")


@pytest.mark.distributed(2)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_two_gpus_train_like_one(case, trained):
    for rank, results in enumerate(trained):
        assert isinstance(results[case.id], dict), f"rank {rank}: {results[case.id]}"
        for kind, (error, where) in results[case.id].items():
            assert error <= LIMIT, f"{kind} on rank {rank}: {error:.2e} of the largest value in {where}"


@pytest.mark.distributed(2)
def test_an_unchanged_script_trains_like_one_rank(tmp_path):
    check_an_unchanged_script(tmp_path, DS_ACCELERATOR="cuda")


@pytest.mark.distributed(2)
def test_resumes_bit_exactly(tmp_path):
    calls = [("resume", str(tmp_path / str(stage)), stage) for stage in (1, 3)]
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    for results in run_distributed(checkpoint_worker.run, 2, calls, backend="nccl", **deterministic):
        assert all(different == [] for different, _ in results.values())

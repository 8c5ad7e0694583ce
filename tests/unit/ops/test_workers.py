# SPDX-License-Identifier: Apache-2.0
"""Parts of an op on threads of their own."""

import os
import threading

import pytest
import torch

from deepspeed_ds4sci.ops import _workers
from deepspeed_ds4sci.ops._workers import run_side_by_side


@pytest.fixture(autouse=True)
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_parts():
    assert run_side_by_side(lambda part: part * 10, range(4)) == [0, 10, 20, 30]


def test_parts_run_at_the_same_time():
    both_here = threading.Barrier(2, timeout=60)
    assert sorted(run_side_by_side(lambda part: both_here.wait(), range(2))) == [0, 1]


def test_a_single_part_runs_in_the_calling_thread():
    assert run_side_by_side(lambda part: threading.current_thread(), [0]) == [threading.current_thread()]


@pytest.mark.parametrize("parts, threads_each", [(2, 2), (3, 1), (4, 1), (6, 1)])
def test_workers_share_the_threads_of_their_caller(parts, threads_each):
    assert run_side_by_side(lambda part: torch.get_num_threads(), range(parts)) == [threads_each] * parts
    assert torch.get_num_threads() == 4


def test_threads_started_later_begin_with_the_callers_number():
    run_side_by_side(str, range(2))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [4]


def test_workers_are_kept():
    names = [set(run_side_by_side(lambda part: threading.current_thread().name, range(2))) for _ in range(5)]
    assert len(set.union(*names)) <= 2


def test_an_error_reaches_the_caller_and_the_workers_go_on():
    def work(part):
        if part == 1:
            raise ArithmeticError("part 1")
        return part

    with pytest.raises(ArithmeticError, match="part 1"):
        run_side_by_side(work, range(2))
    assert run_side_by_side(str, range(2)) == ["0", "1"]


def test_gradients_are_not_recorded_and_inference_mode_is_passed_on():
    x = torch.ones(2, requires_grad=True)
    assert [y.requires_grad for y in run_side_by_side(lambda part: x * part, range(2))] == [False, False]
    with torch.inference_mode():
        assert run_side_by_side(lambda part: torch.is_inference_mode_enabled(), range(2)) == [True, True]
    assert run_side_by_side(lambda part: torch.is_inference_mode_enabled(), range(2)) == [False, False]


def test_a_forked_process_starts_workers_of_its_own():
    run_side_by_side(str, range(2))
    child = os.fork()
    if child == 0:
        os._exit(0 if not _workers._pools and run_side_by_side(str, range(2)) == ["0", "1"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

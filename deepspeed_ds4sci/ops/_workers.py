# SPDX-License-Identifier: Apache-2.0
"""Independent parts of one op on CPU threads of their own, each with a share of torch's intra-op threads.

Torch starts and joins its threads for every single operation. For a long row of short operations, as in `tiled`, it
is better to give each thread a part of the problem: nobody waits for the others until the end. With other work on the
same two cores that made a forward and backward pass ten times faster; on idle cores it makes little difference.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")

_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _forget_pools() -> None:
    """A forked process has the pools of its parent, but not their threads."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget_pools)


def _start_worker(threads_each: int, all_started: threading.Barrier) -> None:
    torch.get_num_threads()  # torch sets a new thread's number at the first look; later it would undo the next line
    torch.set_num_threads(threads_each)
    all_started.wait()


def _pool(num_workers: int, threads_each: int) -> ThreadPoolExecutor:
    """Workers are started once and kept."""
    with _lock:
        if (num_workers, threads_each) not in _pools:
            own_threads = torch.get_num_threads()
            all_started = threading.Barrier(num_workers + 1)
            pool = ThreadPoolExecutor(num_workers, thread_name_prefix="deepspeed_ds4sci")
            for _ in range(num_workers):
                pool.submit(_start_worker, threads_each, all_started)
            all_started.wait()
            # Each thread has a number of its own, but the last one set is what threads started later begin with.
            torch.set_num_threads(own_threads)
            _pools[num_workers, threads_each] = pool
        return _pools[num_workers, threads_each]


def run_side_by_side(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """[work(part) for part in parts], each part in a worker with an equal share of this thread's intra-op threads.

    A single part runs right here. Gradients are not recorded. An error in any part is raised once it is met in order.
    """
    if len(parts) == 1:
        return [work(parts[0])]
    is_inference = torch.is_inference_mode_enabled()

    def in_worker(part: Part) -> Result:
        with torch.inference_mode(is_inference), torch.no_grad():
            return work(part)

    threads_each = max(1, torch.get_num_threads() // len(parts))
    return list(_pool(len(parts), threads_each).map(in_worker, parts))

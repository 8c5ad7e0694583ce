# SPDX-License-Identifier: Apache-2.0
"""Clocks: device events with a flushed L2 cache, CUDA-graph replay, the host clock for the CPU, and peak memory."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MIN_REPS = 5
MAX_REPS = 2000


@dataclass(frozen=True)
class Timing:
    """Milliseconds over `reps` repetitions; low and high are the 10th and 90th percentile."""

    median: float
    low: float
    high: float
    reps: int


def summarize(milliseconds: list[float]) -> Timing:
    ordered = sorted(milliseconds)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


def repetitions(estimate_ms: float, min_ms: float) -> int:
    """How often to run something of this length so that the runs add up to `min_ms`."""
    return max(MIN_REPS, min(MAX_REPS, round(min_ms / max(estimate_ms, 1e-4)) + 1))


class CudaClock:
    """Times each run with a pair of events, after writing a buffer of twice the L2 cache.

    The write also keeps the GPU busy while the host enqueues the run, so that short runs are not measured as gaps
    unless the host is slower than the write (about 0.05 ms).
    """

    def __init__(self, device: torch.device):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def _events(self, run: Callable[[], object], reps: int) -> list[float]:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(reps)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def time(self, run: Callable[[], object], min_ms: float) -> Timing:
        run()
        (estimate,) = self._events(run, 1)
        if estimate >= min_ms:  # slow peers at large sizes: every further run costs seconds
            return summarize([estimate, *self._events(run, 2)])
        self._events(run, repetitions(estimate, min_ms / 4))  # lets clocks and allocator settle
        return summarize(self._events(run, repetitions(estimate, min_ms)))

    @staticmethod
    def graph(run: Callable[[], object]) -> Callable[[], None]:
        """A replay of `run`, captured after a warm-up on the side stream that capture needs."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    @staticmethod
    def extra_memory(run: Callable[[], object]) -> float:
        """Peak MiB allocated by `run` above what is allocated already."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


class CpuClock:
    """Times each run with the host clock. There is no allocator to ask for a peak."""

    def time(self, run: Callable[[], object], min_ms: float) -> Timing:
        run()
        estimate = self._once(run)
        return summarize([self._once(run) for _ in range(repetitions(estimate, min_ms))])

    @staticmethod
    def _once(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    @staticmethod
    def graph(run: Callable[[], object]) -> Callable[[], None]:
        raise NotImplementedError("CUDA graphs need CUDA")

    @staticmethod
    def extra_memory(run: Callable[[], object]) -> None:
        return None


def clock_for(device: torch.device) -> CudaClock | CpuClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()

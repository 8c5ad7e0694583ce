# SPDX-License-Identifier: Apache-2.0
"""Every way an implementation can fail becomes a result; clocks and repetitions."""

import json

import pytest
import torch

from tests.benchmarks.case import Case
from tests.benchmarks.measure import Bench, Result, Settings, first_line, rounded
from tests.benchmarks.peers import PEERS, Peer
from tests.benchmarks.timing import MAX_REPS, MIN_REPS, CpuClock, CudaClock, repetitions, summarize
from tests.helpers.shapes import AttentionShape

CASE = Case.of(AttentionShape("tiny", 1, 3, 8, 8, 2, 8, "test"), "fp32", "random", True)


class Spoiled(Peer):
    """Plain PyTorch that can be told how to fail."""

    name = "spoiled"

    def __init__(self, missing=None, refused=None, bind_error=None, forward_error=None, scale=1.0, backward=True):
        self.missing, self.refused = missing, refused
        self.bind_error, self.forward_error, self.scale = bind_error, forward_error, scale
        self.has_backward = backward

    def unavailable_reason(self, device_type):
        return self.missing

    def refused_reason(self, case):
        return self.refused

    def bind(self, case, inputs):
        if self.bind_error:
            raise self.bind_error
        call = PEERS["eager"].bind(case, inputs)
        right = call.forward

        def forward():
            if self.forward_error and torch.is_grad_enabled():
                raise self.forward_error
            return self.scale * right()

        call.forward = forward
        return call


def measure(peer: Peer, **settings) -> list[Result]:
    bench = Bench(torch.device("cpu"), CpuClock(), Settings(min_ms=0.01, memory=False, **settings))
    return bench.measure(CASE, peer, bench.expect(CASE))


def test_what_is_right_is_timed():
    forward, both = measure(Spoiled())
    assert (forward.which, both.which) == ("fwd", "fwd+bwd")
    for result in (forward, both):
        assert result.status == "ok" and result.timing.median > 0
        assert result.tflops == pytest.approx(CASE.flops(result.which) / result.timing.median / 1e9)
    assert list(forward.errors) == ["o"] and len(both.errors) == 5


@pytest.mark.parametrize(
    ("peer", "status", "reason"),
    [
        (Spoiled(missing="pip install it"), "missing", "pip install it"),
        (Spoiled(refused="squares only"), "refused", "squares only"),
        (Spoiled(bind_error=torch.OutOfMemoryError("no")), "OOM", "memory"),
        (Spoiled(bind_error=KeyError("lost")), "failed", "KeyError: 'lost'"),
        (Spoiled(bind_error=NotImplementedError("16-bit only")), "refused", "16-bit only"),
        (Spoiled(scale=0.0), "WRONG", "o 1.0e"),
        (Spoiled(scale=float("nan")), "WRONG", "o inf"),
    ],
)
def test_what_cannot_be_timed_says_why(peer, status, reason):
    for result in measure(peer):
        assert result.status == status and reason in result.reason and result.timing is None


def test_forward_is_timed_where_only_the_backward_fails():
    forward, both = measure(Spoiled(forward_error=torch.OutOfMemoryError("no")))
    assert (forward.status, both.status) == ("ok", "OOM")


def test_a_peer_without_backward():
    forward, both = measure(Spoiled(backward=False))
    assert (forward.status, both.status, both.reason) == ("ok", "refused", "forward only")


def test_only_the_passes_asked_for():
    assert [result.which for result in measure(Spoiled(), passes=("fwd",))] == ["fwd"]


def test_graph_lines_say_why_there_is_no_replay():
    results = measure(Spoiled(), graph_logits=CASE.logits)
    assert [result.mode for result in results] == ["eager", "graph"] * 2
    assert results[1].status == "failed" and "CUDA graphs need CUDA" in results[1].reason
    peer = Spoiled()
    peer.graph_reason = "another stream"
    assert measure(peer, graph_logits=CASE.logits)[1].reason == "another stream"
    assert len(measure(Spoiled(), graph_logits=CASE.logits - 1)) == 2


def test_results_are_plain_json():
    result = measure(Spoiled(scale=float("nan")))[0].as_json()
    assert result["errors"] == {"o": "not finite"}
    json.dumps(result, allow_nan=False)
    timed = measure(Spoiled())[0].as_json()
    assert timed["timing"]["median"] == rounded(timed["timing"]["median"])


def test_rounded_keeps_counts_and_five_digits():
    assert rounded(123456) == 123456
    assert rounded(1.23456789) == 1.2346


def test_first_line_of_an_error():
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert first_line(ValueError()) == "ValueError"


def test_repetitions_fill_the_time_within_bounds():
    assert repetitions(1.0, 200.0) == 201
    assert repetitions(500.0, 200.0) == MIN_REPS
    assert repetitions(0.0, 200.0) == MAX_REPS


def test_summary_is_median_and_outer_tenths():
    timing = summarize([float(value) for value in range(101)][::-1])
    assert (timing.median, timing.low, timing.high, timing.reps) == (50.0, 10.0, 90.0, 101)


def test_cpu_clock_warms_up_first():
    calls = []
    timing = CpuClock().time(lambda: calls.append(1), 0.0)
    assert len(calls) == timing.reps + 2 and CpuClock.extra_memory(lambda: None) is None


class CountedCudaClock(CudaClock):
    """The device clock with made-up times in place of events."""

    def __init__(self, milliseconds: float):
        self.milliseconds, self.runs = milliseconds, 0

    def _events(self, run, reps):
        self.runs += reps
        return [self.milliseconds] * reps


@pytest.mark.parametrize(("length", "reps"), [(300.0, 3), (50.0, 5), (1.0, 201)])
def test_device_clock_spends_little_on_slow_runs(length, reps):
    clock = CountedCudaClock(length)
    assert clock.time(lambda: None, 200.0).reps == reps
    assert clock.runs <= max(3, 1 + 1.3 * reps + MIN_REPS)

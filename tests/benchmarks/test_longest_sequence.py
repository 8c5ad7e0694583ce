# SPDX-License-Identifier: Apache-2.0
"""The search of a rung's longest sequence: over processes, of which each ends with its first failure."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from tests.benchmarks import longest_sequence, throughput_by_length
from tests.benchmarks.long_sequence import launch, models, report, worker
from tests.benchmarks.long_sequence.rungs import RUNGS

OK = dict(batch_size=1, length=64, status="ok", seconds=0.5, device_gib=1.0, host_gib=2.0)
ABOUT = dict(device="card", cuda="-", driver="-", torch="2", commit="abc", date="2026-01-01", command="c")
STEPS = dict(timed_step=2, step_seconds=[0.7, 0.5])
OOM = dict(batch_size=1, length=128, status="out of memory")


def prober(monkeypatch, limit, **changes):
    """Options for a rung that trains up to `limit` tokens on a machine that holds so many."""
    calls = []

    def run_cases(job, **_):
        tried = []
        monkeypatch.setattr(worker.torch.cuda, "memory_allocated", lambda: 100 * 2**20)
        monkeypatch.setattr(worker.torch.cuda, "max_memory_allocated", lambda: (100 + tried[-1]) * 2**20)
        monkeypatch.setattr(worker.torch.cuda, "mem_get_info", lambda: (0, int(1.03 * (100 + limit) * 2**20)))
        monkeypatch.setattr(worker.dist, "all_reduce", lambda *_: None)
        monkeypatch.setattr(worker.torch, "tensor", lambda value, **_: value)
        found = []
        for _, length in worker.cases(job, torch.device("cuda")):
            tried.append(length)
            case = OK | STEPS | {"device_gib": length / 1024} if length <= limit else OOM
            found.append(case | dict(event="case", length=length))
            if length > limit:
                break
        calls.append(tried)
        return found

    monkeypatch.setattr(longest_sequence, "run_cases", run_cases)
    options = longest_sequence.parse_arguments(["--tiny", "--rungs", "recompute"])
    vars(options).update(changes)
    return options, calls


def test_a_rung_is_searched_with_few_processes(monkeypatch):
    options, calls = prober(monkeypatch, limit=5000)
    options.limit = 2**20
    found = longest_sequence.measure_rung(options.rungs[0], options, time.monotonic() + 100, 1e12)
    assert found["longest"] <= 5000 < found["failed"] and found["resolved"] and found["because"] == "out of memory"
    assert len(calls) == 1 and calls[0][0] == 64 and len(calls[0]) <= 4 and found["ended"] == "resolution"
    assert [case["length"] for case in found["cases"]] == sorted(case["length"] for case in found["cases"])


def test_a_search_goes_on_below_a_guess_that_was_too_long(monkeypatch):
    options, calls = prober(monkeypatch, limit=500)
    options.limit, options.rungs, options.guess = 4096, [RUNGS["mask-cpu"]], 1024
    found = longest_sequence.measure_rung(options.rungs[0], options, time.monotonic() + 100, 1e12)
    assert calls[0] == [1024] and found["longest"] <= 500 < found["failed"] and found["resolved"] and len(calls) <= 4


def test_a_search_that_its_limit_ends_says_so(monkeypatch):
    options, calls = prober(monkeypatch, limit=5000)
    options.limit, options.guess = 128, 1024
    found = longest_sequence.measure_rung(options.rungs[0], options, time.monotonic() + 100, 1e12)
    assert calls == [[128]] and (found["longest"], found["failed"], found["ended"]) == (128, None, "limit")
    line = report.markdown_ladder([{"machine": ABOUT, "rungs": [found]}]).splitlines()[2]
    assert "| 128 | none, of up to 128 |" in line


def test_given_lengths_are_tried_alone_and_a_spent_budget_ends_the_search(monkeypatch):
    options, calls = prober(monkeypatch, limit=100, lengths=[64, 128])
    found = longest_sequence.measure_rung(options.rungs[0], options, time.monotonic() + 100, 1e12)
    assert calls == [[64, 128]] and (found["longest"], found["failed"]) == (64, 128)
    options, calls = prober(monkeypatch, limit=100)
    found = longest_sequence.measure_rung(options.rungs[0], options, time.monotonic(), 1e12)
    assert calls == [] and (found["longest"], found["failed"], found["resolved"]) == (0, None, False)


def test_a_learned_table_has_rows_for_the_longest_that_a_search_may_try():
    options = longest_sequence.parse_arguments(["--tiny", "--rungs", "mask-cpu,recompute"])
    options.limit = 2**20

    def limits():
        return [longest_sequence.Prober(rung, options, 0).limit for rung in options.rungs]

    own = 2 * RUNGS["mask-cpu"].guess
    assert options.guess < own and limits() == [own, 2**20]  # a short guess ends no search early
    options.guess = own
    assert limits() == [2 * own, 2**20]
    climb = dict(start=64, limit=256)
    job = models.job_of(options.rungs[0], [], tiny=True, compute_layers=None, climb=climb)
    assert job["model"]["max_positions"] == 256 and job["cases"] == []


def processes(monkeypatch, *runs):
    """Those that searches start, in turn: the lengths that train in each, the one that does not, and its exit code."""
    runs, jobs = iter(runs), []

    def start(folder, ranks, tiny):
        good, bad, code = next(runs)
        jobs.append(json.loads((folder / "job.json").read_text()))
        lines = [{"event": "ready"}] if good or bad else []
        for length in [*good, *bad]:
            case = OK | STEPS if length in good else OOM
            lines += [{"event": "trying", "batch_size": 1, "length": length}, case | dict(event="case", length=length)]
        (folder / "output.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "log-0.txt").write_text("out of luck")
        return [SimpleNamespace(poll=lambda: code, wait=lambda: code)]

    monkeypatch.setattr(launch, "_start", start)
    options = longest_sequence.parse_arguments(["--tiny", "--rungs", "recompute"])
    options.limit = 2**20
    return options, jobs


@pytest.mark.parametrize("code", [worker.OUT_OF_MEMORY, -9, 1])
def test_processes_that_do_not_start_say_nothing_about_a_length(monkeypatch, code):
    options, jobs = processes(monkeypatch, ([64, 128], [512], worker.OUT_OF_MEMORY), ([], [], code))
    found = longest_sequence.measure_rung(options.rungs[0], options, time.monotonic() + 100, 1e12)
    assert len(jobs) == 2 and jobs[1]["climb"]["failed"] == 512
    assert (found["longest"], found["failed"], found["because"]) == (128, 512, "out of memory")
    assert (found["resolved"], found["ended"]) == (False, "start")
    assert [(case["length"], case["status"]) for case in found["cases"]][:2] == [(64, "ok"), (128, "ok")]


def test_a_search_whose_first_processes_do_not_start_ends(monkeypatch):
    options, jobs = processes(monkeypatch, ([], [], worker.OUT_OF_MEMORY))
    found = longest_sequence.measure_rung(options.rungs[0], options, time.monotonic() + 100, 1e12)
    assert (found["longest"], found["failed"], found["resolved"], found["ended"]) == (0, 64, False, "start")
    assert [case["starting"] for case in found["cases"]] == [True]


def test_a_failure_at_the_start_is_booked_under_the_length_that_came_next(monkeypatch):
    options, _ = processes(monkeypatch, ([], [], worker.OUT_OF_MEMORY))
    climb = dict(start=64, multiple=32, limit=2**20, precision=1.1, failed=512, peaks=[[64, 2**30], [128, 2**30]])
    job = models.job_of(options.rungs[0], [], tiny=True, compute_layers=None, climb=climb)
    (record,) = launch.run_cases(job, ranks=1, seconds=100, tiny=True)
    assert (record["length"], record["status"], record["starting"]) == (256, "out of memory", True)


def test_a_length_that_trained_stays_good(monkeypatch):
    options, _ = processes(monkeypatch, ([64], [], 0), ([], [64], worker.OUT_OF_MEMORY))
    found = longest_sequence.Prober(options.rungs[0], options, time.monotonic() + 100)
    for _ in range(2):
        found.run([64])
    assert (found.longest, found.failed) == (64, None)


def test_processes_that_end_badly_are_told_apart(tmp_path):
    def ended(*codes):
        output = tmp_path / "output"
        output.touch()
        processes = [SimpleNamespace(poll=lambda code=code: code) for code in codes]
        return launch._wait(processes, output, time.monotonic() + 0.3, None, 100)

    assert ended(0, 0) == "ok" and ended(1, None) == "failed" and ended(None, 0) == "time"
    assert ended(None, worker.OUT_OF_MEMORY) == "out of memory" and ended(-9, 1) == "host memory"
    assert ended(None, worker.HOST_MEMORY) == "host memory"


@pytest.mark.parametrize(("limit", "gib"), [("max", 6), (str(8 * 2**30), 5), (str(64 * 2**30), 6), (None, 6)])
def test_cpu_memory_that_is_left_is_the_machines_or_the_containers(monkeypatch, tmp_path, limit, gib):
    """The container uses 5 GiB, of which 2 are page cache: 3."""
    monkeypatch.setattr(worker, "_MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {6 * 2**20} kB\n")
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{5 * 2**30}\n")
        (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2**30}\nactive_file {2**30}\n")
    assert worker.host_memory_left(tmp_path) == gib * 2**30


# Of the thread, which ends where its process would.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_ends_before_the_machine_has_no_cpu_memory_left(monkeypatch):
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit  # ends the thread alone

    monkeypatch.setattr(worker.os, "_exit", leave)
    left = iter([2**40, 2**31 - 1])
    monkeypatch.setattr(worker, "host_memory_left", lambda: next(left))
    worker.HostMemory(every=0.01)._thread.join(10)
    assert codes == [worker.HOST_MEMORY] and next(left, None) is None


def test_a_start_that_hangs_does_not_take_the_time_of_the_search(tmp_path):
    output = tmp_path / "output"
    output.touch()
    hangs = [SimpleNamespace(poll=lambda: None)]
    began = time.monotonic()
    assert launch._wait(hangs, output, began + 60, None, 0.2) == "time" and time.monotonic() < began + 30
    output.write_text('{"event": "ready"}\n')  # from here on it is the case that takes the time
    began = time.monotonic()
    assert launch._wait(hangs, output, began + 0.6, None, 0.2) == "time" and time.monotonic() > began + 0.5


@pytest.mark.parametrize(("quota", "cpus"), [("max 100000", 8), ("400000 100000", 4), ("50000 100000", 1), ("", 8)])
def test_threads_are_those_of_the_cpus_that_a_container_gives(monkeypatch, tmp_path, quota, cpus):
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: range(8))
    (tmp_path / "cpu.max").write_text(quota)
    assert launch.usable_cpus(tmp_path / "cpu.max") == cpus and launch.usable_cpus(tmp_path / "none") == 8


@pytest.fixture
def larger_gpu(monkeypatch):
    """A GPU of 140 GiB, of which torch holds 38, CUDA and NCCL 2. Returns the fractions that torch is limited to."""
    fractions, gib = [], 2**30
    monkeypatch.setattr(worker.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(worker.torch.cuda, "mem_get_info", lambda *_: (100 * gib, 140 * gib))
    monkeypatch.setattr(worker.torch.cuda, "memory_reserved", lambda *_: 38 * gib)
    monkeypatch.setattr(worker.torch.cuda, "memory_allocated", lambda *_: 36 * gib)
    monkeypatch.setattr(worker.torch.cuda, "max_memory_allocated", lambda *_: 37 * gib)
    monkeypatch.setattr(
        worker.torch.cuda, "set_per_process_memory_fraction", lambda fraction, _: fractions.append(fraction)
    )
    return fractions


def test_a_larger_gpu_can_be_used_like_a_smaller_one(larger_gpu):
    """What CUDA and NCCL hold beside torch's allocator is taken from the smaller one too."""
    worker.limit_device(79, torch.device("cuda"))
    assert larger_gpu == [pytest.approx((79 - 2) / 140)]
    with pytest.raises(ValueError, match="--device-gib must be at most 140.00, what the GPU has, got 141"):
        worker.limit_device(141, torch.device("cuda"))


@pytest.mark.parametrize("gib", [38.9, 0])
def test_states_that_a_smaller_gpu_could_not_hold_are_out_of_memory(monkeypatch, larger_gpu, gib):
    """They are there before the limit, and torch would go on with what it has."""

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(worker.os, "_exit", leave)
    with pytest.raises(SystemExit, match=str(worker.OUT_OF_MEMORY)):
        worker.limit_device(gib, torch.device("cuda"))
    assert not larger_gpu


@pytest.mark.parametrize("module", [longest_sequence, throughput_by_length])
def test_the_size_of_the_gpu_reaches_the_processes_and_their_search(monkeypatch, larger_gpu, module):
    jobs, capacities = [], []
    monkeypatch.setattr(module, "run_cases", lambda job, **_: jobs.append(job) or [])
    options = module.parse_arguments(["--tiny", "--device-gib", "79"])
    if module is throughput_by_length:
        module.measure(options.variants[0], [(1, 64)], options, time.monotonic() + 100, 1e12)
        assert [job["device_gib"] for job in jobs] == [79]
        return
    module.measure_rung(options.rungs[0], options, time.monotonic() + 100, 1e12)
    assert [job["device_gib"] for job in jobs] == [79]
    ended = SimpleNamespace(next_length=lambda: None)
    monkeypatch.setattr(worker, "Climb", lambda **fields: capacities.append(fields["capacity"]) or ended)
    monkeypatch.setattr(worker.dist, "all_reduce", lambda *_: None)
    monkeypatch.setattr(worker.torch, "tensor", lambda value, **_: value)
    assert not list(worker.cases(jobs[0], torch.device("cuda")))
    assert capacities == [int(0.975 * 79 * 2**30)]


@pytest.mark.parametrize(("named", "threads"), [(None, "3"), ("5", "5")])
def test_ranks_share_the_cpus_unless_their_number_of_threads_is_given(monkeypatch, tmp_path, named, threads):
    monkeypatch.setattr(launch, "usable_cpus", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if named:
        monkeypatch.setenv("OMP_NUM_THREADS", named)
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, env, **__: env["OMP_NUM_THREADS"])
    assert launch._start(tmp_path, 2, tiny=False) == [threads] * 2

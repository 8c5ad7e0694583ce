# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of a rung, waits as long as it may, and says how each length ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.climb import Climb
from tests.benchmarks.long_sequence.worker import HOST_MEMORY, OUT_OF_MEMORY

ROOT = Path(__file__).resolve().parents[3]
START_SECONDS = 150.0  # for processes to start, to make model and engine and to train one short step
_TAIL = 2000  # characters of output kept of a run that failed


def usable_cpus(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPUs that this process may use. A container often shows all of its host's and gives a share of their time, in
    which as many threads as there are CPUs to be seen stand in each other's way."""
    cpus = len(os.sched_getaffinity(0))
    try:
        share, period = quota.read_text().split()
        return cpus if share == "max" else max(1, min(cpus, int(share) // int(period)))
    except (OSError, ValueError):
        return cpus


def longest_repeated(case_seconds: float, steps: int) -> float:
    """Seconds of the longest step that is repeated unless told otherwise: all and one more fit into a case."""
    return case_seconds / (steps + 1)


def run_cases(job: dict, *, ranks: int, seconds: float, tiny: bool, case_seconds: float | None = None) -> list[dict]:
    """Trains on each case of job["cases"], [batch size, tokens], in turn, in new processes; then on the lengths that a
    search asks for, if the job has one, until one fails.

    Args:
        job: what `worker.main` reads, without its output and its end.
        seconds: for all of it; case_seconds: for one case, the start of the processes not counted, for which there
            are START_SECONDS.

    Returns:
        A record per case that was tried: see `worker.measure`. Its status is "ok", "out of memory", "time" (cut off
        after one of these times), "host memory" (hardly any was left, or the kernel killed a rank) or "failed", the
        last with "failure".
        "starting": True where the processes ended before they tried a case: the record is of the first one that they
        would have tried, and says little about its length.
    """
    with tempfile.TemporaryDirectory(prefix="ds4sci-rung-") as folder:
        folder = Path(folder)
        output = folder / "output.jsonl"
        output.touch()
        until = time.monotonic() + seconds  # a clock of the machine, the same in all processes
        (folder / "job.json").write_text(json.dumps({**job, "output": str(output), "until": until}))
        processes = _start(folder, ranks, tiny)
        try:
            ended = _wait(processes, output, until, case_seconds, START_SECONDS)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        lines = _read(output)
        records = [record for record in lines if record["event"] == "case"]
        failed = records and records[-1]["status"] != "ok"
        tried = [(record["batch_size"], record["length"]) for record in lines if record["event"] == "trying"]
        start = [] if records or job["climb"] is None else [(1, _first_length(job["climb"]))]
        left = tried[len(records) :] or job["cases"][len(records) :] or start
        if ended != "ok" and not failed and left:
            batch_size, length = left[0]
            logs = "".join((folder / f"log-{rank}.txt").read_text(errors="replace")[-_TAIL:] for rank in range(ranks))
            record = {"event": "case", "batch_size": batch_size, "length": length, "status": ended}
            record |= {} if tried else {"starting": True}
            records.append(record | ({"failure": logs} if ended == "failed" else {}))
        return records


def _first_length(climb):
    """Of a search, as far as can be told without its processes: they know the capacity."""
    return Climb(**climb | {"capacity": 0, "peaks": dict(climb["peaks"])}).next_length()


def _start(folder, ranks, tiny):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        variables = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            # Both names of the setting: torch changed it.
            **dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), "expandable_segments:True"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        variables.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // ranks)))
        if tiny:
            variables |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        with open(folder / f"log-{rank}.txt", "w") as log:
            command = [sys.executable, "-m", "tests.benchmarks.long_sequence.worker", str(folder / "job.json")]
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=variables))
    return processes


def _wait(processes, output, deadline, case_seconds, start_seconds):
    """How it ended: "failed", "out of memory", "host memory" or "time"; "ok" when every rank is through."""
    seen, since = 0, time.monotonic()  # lines of output, and when the start or the case in work began
    while True:
        codes = [process.poll() for process in processes]
        if any(code not in (None, 0) for code in codes):
            reason = {OUT_OF_MEMORY: "out of memory", HOST_MEMORY: "host memory", -signal.SIGKILL: "host memory"}
            return next((reason[code] for code in codes if code in reason), "failed")
        if all(code == 0 for code in codes):
            return "ok"
        now = time.monotonic()
        lines = len(_read(output))
        if lines != seen:
            seen, since = lines, now
        limit = case_seconds if seen else start_seconds
        if now > deadline or (limit is not None and now > since + limit):
            return "time"
        time.sleep(0.1)


def _read(output):
    return [json.loads(line) for line in output.read_text().splitlines(keepends=True) if line.endswith("\n")]

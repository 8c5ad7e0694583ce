# SPDX-License-Identifier: Apache-2.0
"""Running a function on several ranks, one process each, one launch for many cases: CPU ranks with gloo between them,
or a GPU per rank with NCCL.

CPU ranks are forked from a process that has imported what they need (rank_imports.py), which takes longer than most of
what they do. Ranks with a GPU start afresh, since CUDA does not survive a fork.

A rank that fails or dies ends the others, and the error carries what it printed; a launch that takes too long is ended
and says which ranks were still at work.
"""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

import torch

_ROOT = Path(__file__).parents[2]
_ACCELERATOR = {"gloo": {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}, "nccl": {"DS_ACCELERATOR": "cuda"}}
_TAIL = 6000  # characters of a rank's output in an error message


class RankFailure(AssertionError):
    """A rank failed, died, or did not end in time."""


def run_distributed(function, world_size, *arguments, timeout=300, backend="gloo", **environment):
    """Runs `function(*arguments)` on every rank and returns the list of what the ranks returned.

    Args:
        function: a module-level function of an importable module; torch.distributed is up when it is called.
        world_size: processes to start.
        arguments: anything that torch.save takes.
        timeout: seconds for the whole launch.
        backend: "gloo": no rank sees a GPU. "nccl": rank r uses GPU r.
        environment: environment variables to set.

    Raises:
        RankFailure: with the number of the rank and the end of its output.
    """
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ds4sci-ranks-") as folder:
        folder = Path(folder)
        torch.save((function.__module__, function.__name__, arguments, backend), folder / "call.pt")
        started = time.monotonic()
        ranks = _start(folder, world_size, backend, environment)
        try:
            _wait(ranks, folder, started + timeout)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


class _ForkedRank(ForkServerProcess):
    """A process by the names of subprocess.Popen."""

    def poll(self):
        return self.exitcode

    def wait(self):
        self.join()


def _start_fork_server():
    """Unless it is up. Ranks get an environment of their own; this one is for the imports."""
    forkserver.set_forkserver_preload(["tests.helpers.rank_imports"])
    # Without the processes that torch's compiler keeps ready, whose threads no rank would have.
    with mock.patch.dict(os.environ, {**_common_variables(), **_ACCELERATOR["gloo"], "TORCH_WARM_POOL": "0"}):
        forkserver.ensure_running()


def _common_variables():
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}


def _start(folder, world_size, backend, environment):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if backend == "gloo":
        _start_fork_server()
    ranks = []
    for rank in range(world_size):
        variables = {
            **os.environ,
            **_common_variables(),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            **_ACCELERATOR[backend],
            **{name: str(value) for name, value in environment.items()},
        }
        if backend == "gloo":
            process = _ForkedRank(target=_forked, args=(folder, rank, variables))
            process.start()
            ranks.append(process)
            continue
        with open(folder / f"log-{rank}.txt", "w") as log:
            command = [sys.executable, "-m", "tests.helpers.distributed", str(folder)]
            ranks.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=_ROOT, env=variables))
    return ranks


def _forked(folder, rank, variables):
    """What a fresh process would begin with."""
    with open(folder / f"log-{rank}.txt", "w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    os.chdir(_ROOT)
    os.environ.clear()
    os.environ.update(variables)
    multiprocessing.set_start_method(None, force=True)  # for processes of the rank's own, back to Python's choice
    _main(folder)


def _wait(ranks, folder, deadline):
    while True:
        codes = [process.poll() for process in ranks]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            # The rank that failed by itself, if it can be told from those that lost their neighbour. A rank that is
            # killed loses its connections before its exit code is known, so its neighbour's may come first.
            time.sleep(0.5)
            codes = [process.poll() for process in ranks]
            failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
            rank = next((r for r in failed if not _lost_its_neighbour(_tail(folder, r))), failed[0])
            raise RankFailure(f"rank {rank} of {len(ranks)} ended with code {codes[rank]}:\n{_tail(folder, rank)}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            busy = [rank for rank, code in enumerate(codes) if code is None]
            raise RankFailure(f"ranks {busy} of {len(ranks)} did not end in time:\n{_tail(folder, busy[0])}")
        time.sleep(0.05)


def _lost_its_neighbour(tail):
    return "Connection closed by peer" in tail or "Connection reset by peer" in tail


def _tail(folder, rank):
    return (folder / f"log-{rank}.txt").read_text(errors="replace")[-_TAIL:]


def _main(folder):
    folder = Path(folder)
    module, name, arguments, backend = torch.load(folder / "call.pt", weights_only=False)
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=60))
    result = getattr(importlib.import_module(module), name)(*arguments)
    torch.save(result, folder / f"result-{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1])

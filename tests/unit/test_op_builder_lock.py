# SPDX-License-Identifier: Apache-2.0
"""The build lock: a killed holder, a file left over, two processes at once."""

import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from deepspeed_ds4sci.op_builder import lock as lock_module
from deepspeed_ds4sci.op_builder.lock import build_lock, read_holder

_HOLD = """
    import pathlib, sys, time
    from deepspeed_ds4sci.op_builder.lock import build_lock
    with build_lock(pathlib.Path(sys.argv[1]), timeout_s=5):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def lock_path(tmp_path):
    return tmp_path / "library.lock"


@pytest.fixture
def holder(lock_path):
    """A process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_HOLD), str(lock_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_timeout_names_file_and_holder(lock_path, holder):
    with pytest.raises(TimeoutError) as caught, build_lock(lock_path, timeout_s=0.3, poll_s=0.05):
        pass
    assert str(lock_path) in str(caught.value)
    assert f"process {holder.pid} on host {os.uname().nodename}" in str(caught.value)
    assert "DS4SCI_BUILD_TIMEOUT" in str(caught.value)


def test_killed_holder_blocks_nobody(lock_path, holder, caplog):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock_path.is_file()
    assert read_holder(lock_path).startswith(f"process {holder.pid} ")
    start = time.monotonic()
    with build_lock(lock_path, timeout_s=5):
        assert read_holder(lock_path).startswith(f"process {os.getpid()} ")
    assert time.monotonic() - start < 1
    assert not caplog.records


def test_waiter_says_whom_it_waits_for_and_goes_on(lock_path, holder, caplog):
    caplog.set_level(logging.WARNING)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    with build_lock(lock_path, timeout_s=20, poll_s=0.05):
        pass
    killer.wait()
    assert caplog.text.count(f"waiting for process {holder.pid} on host") == 1


@pytest.mark.parametrize("content", ["", "garbage", '{"pid": 1}', '["pid"]', '{"pid": 999999, "host": "elsewhere"}'])
def test_left_over_file_blocks_nobody(lock_path, content):
    lock_path.write_text(content)
    with build_lock(lock_path, timeout_s=0.5):
        assert read_holder(lock_path).startswith(f"process {os.getpid()} ")


def test_holder_of_an_unreadable_file(tmp_path):
    assert read_holder(tmp_path / "missing.lock") == "an unknown process"


def test_file_system_without_locks_is_named(lock_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "flock", no_locks)
    message = r"cannot lock .*library.lock .*No locks available\); set DS4SCI_CACHE_DIR"
    with pytest.raises(OSError, match=message), build_lock(lock_path, timeout_s=1):
        pass


def test_lock_is_free_after_an_exception(lock_path):
    with pytest.raises(KeyError), build_lock(lock_path, timeout_s=1):
        raise KeyError("build failed")
    with build_lock(lock_path, timeout_s=0.5):
        pass

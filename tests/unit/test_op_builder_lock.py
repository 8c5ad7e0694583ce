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


@pytest.fixture
def of_another_user(monkeypatch):
    """Files cannot be opened for writing, as those of another user; root would be allowed to."""
    open_any = os.open

    def open_to_read(path, flags, *rest):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_any(path, flags, *rest)

    monkeypatch.setattr(lock_module.os, "open", open_to_read)


def test_lock_of_another_user_is_waited_for(lock_path, holder, of_another_user, caplog):
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    start = time.monotonic()
    # Two ranks of the second user do not wait for each other.
    with build_lock(lock_path, 20, 0.05) as first, build_lock(lock_path, 0.5, 0.05) as second:
        assert first is second is False
    assert time.monotonic() - start > 0.2
    killer.wait()
    assert caplog.text.count(f"waiting for process {holder.pid} on host") == 1
    assert read_holder(lock_path).startswith(f"process {holder.pid} ")


def test_lock_of_another_user_times_out(lock_path, holder, of_another_user):
    with pytest.raises(TimeoutError, match=f"held by process {holder.pid} "), build_lock(lock_path, 0.3, 0.05):
        pass


def test_lock_that_cannot_be_created_is_not_held(lock_path, of_another_user):
    with build_lock(lock_path, timeout_s=1) as held:
        assert held is False
    assert not lock_path.exists()


def test_other_errors_of_the_lock_file_are_raised(tmp_path):
    with pytest.raises(IsADirectoryError), build_lock(tmp_path, timeout_s=1):
        pass


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
    with build_lock(lock_path, timeout_s=5) as held:
        assert held is True
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

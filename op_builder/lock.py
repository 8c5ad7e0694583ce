# SPDX-License-Identifier: Apache-2.0
"""A lock between processes that cannot go stale.

The kernel releases an flock when its holder ends, however it ends, so a lock file left over on disk means nothing. The
holder writes who it is into the file, for those who wait. Another user, who may not write it, can wait for it too.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time

logger = logging.getLogger(__name__)


_NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)


def read_holder(path):
    """Who wrote the lock file last, as text: "process 17 on host node3"."""
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on host {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


@contextlib.contextmanager
def build_lock(path, timeout_s, poll_s=0.2):
    """Holds the lock file `path` for the length of the `with` block.

    Gives True to the holder. Who may not write the file, since it is another user's, gets False once nobody holds it:
    whatever was to be built is there now or has to be built elsewhere.

    Args:
        path: pathlib.Path of the lock file; its folder exists.
        timeout_s: seconds to wait for another holder.
        poll_s: seconds between two tries.

    Raises:
        TimeoutError: still held after `timeout_s`; names the file and the holder.
        OSError: the file system has no locks.
    """
    descriptor, writable = _open(path)
    if descriptor is None:
        yield False
        return
    try:
        _acquire(descriptor, path, fcntl.LOCK_EX if writable else fcntl.LOCK_SH, timeout_s, poll_s)
        if writable:
            holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()})
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        yield writable
    finally:
        os.close(descriptor)  # releases the lock; the file stays, since removing it would race with those who wait


def _open(path):
    """(descriptor, whether it may be written); (None, False) where this user may not even read or create the file."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666), True
    except OSError as error:
        if error.errno not in _NOT_PERMITTED:
            raise
    try:
        return os.open(path, os.O_RDONLY), False
    except (PermissionError, FileNotFoundError):
        return None, False


def _acquire(descriptor, path, kind, timeout_s, poll_s):
    start = time.monotonic()
    announced = False
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        except OSError as error:
            raise OSError(f"cannot lock {path} ({error}); set DS4SCI_CACHE_DIR to a local folder") from error
        if time.monotonic() - start >= timeout_s:
            raise TimeoutError(
                f"waited {timeout_s:.0f} s for the build lock {path}, held by {read_holder(path)}; if that process "
                "hangs, end it; to wait longer, set DS4SCI_BUILD_TIMEOUT (seconds)"
            )
        if not announced:
            logger.warning("waiting for %s, which holds the build lock %s", read_holder(path), path)
            announced = True
        time.sleep(poll_s)

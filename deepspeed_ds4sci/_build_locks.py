# SPDX-License-Identifier: Apache-2.0
"""The lock files of torch's just-in-time builds, which a killed compilation leaves behind for good."""

import logging
import os
import time

logger = logging.getLogger(__name__)


def warn_of_old_lock(name: str) -> None:
    """Says before a build of the extension `name` that it will wait, without a word, for a lock that was there before
    this process: no rank of this launch holds it. Nothing is removed; another launch may be compiling.
    """
    import psutil
    from torch.utils import cpp_extension

    build_directory = getattr(cpp_extension, "_get_build_directory", None)
    if build_directory is None:
        return  # another release of torch, with other locks
    path = os.path.join(build_directory(name, False), "lock")
    try:
        written = os.path.getmtime(path)
    except OSError:
        return
    if written < psutil.Process().create_time():
        logger.warning(
            "the build of %s waits for the lock %s, written %.0f s ago, before this process: if nothing on this "
            "machine is compiling it, a killed compilation has left it; delete it then",
            name,
            path,
            time.time() - written,
        )

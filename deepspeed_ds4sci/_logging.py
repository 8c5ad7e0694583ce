# SPDX-License-Identifier: Apache-2.0
"""Where the package's log lines go when the application has not set up logging: stderr, from INFO on rank 0,
from WARNING on the others.

Modules use `logging.getLogger(__name__)` and never touch handlers. An application that configures the root logger
gets the records there, and this handler keeps quiet.
"""

import logging
import os
import sys

_PACKAGE = "deepspeed_ds4sci"


class _FallbackHandler(logging.Handler):
    """Writes to the stderr of the moment, like logging's own last resort, but only while the root has no handler."""

    def emit(self, record):
        if logging.getLogger().handlers:
            return
        if record.levelno < logging.WARNING and os.environ.get("RANK", "0") != "0":
            return
        try:
            sys.stderr.write(f"[{_PACKAGE}] {record.levelname}: {record.getMessage()}\n")
        except Exception:
            self.handleError(record)


def attach_handler():
    """Attaches the handler once; sets the level to INFO unless the application chose one."""
    logger = logging.getLogger(_PACKAGE)
    if not any(isinstance(handler, _FallbackHandler) for handler in logger.handlers):
        logger.addHandler(_FallbackHandler())
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)

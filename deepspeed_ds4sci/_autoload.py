# SPDX-License-Identifier: Apache-2.0
"""The `torch.backends` entry point: installs the lazy hooks into DeepSpeed at the end of `import torch`.

Standard library only, below a millisecond, and silent: an exception that leaves this module would make `import torch`
fail for every program of the environment. `DS4SCI_DISABLE=1` turns it off, as does torch's own
`TORCH_DEVICE_BACKEND_AUTOLOAD=0`; after the latter an explicit `import deepspeed_ds4sci` does the same work.
"""

import logging
import os


def disabled_by_environment():
    """True if DS4SCI_DISABLE is set to anything but an empty string or 0."""
    return os.environ.get("DS4SCI_DISABLE", "") not in ("", "0")


def register():
    """Installs the hooks unless DS4SCI_DISABLE is set. Never raises; a second call changes nothing."""
    if disabled_by_environment():
        return
    try:
        from deepspeed_ds4sci import plugin

        plugin.enable()
    except Exception as error:
        # Debug, not warning: most programs that import torch never use DeepSpeed.
        logging.getLogger("deepspeed_ds4sci").debug("hooks into DeepSpeed are off: %r", error)

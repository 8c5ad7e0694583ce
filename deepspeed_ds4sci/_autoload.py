# SPDX-License-Identifier: Apache-2.0
"""The `torch.backends` entry point: at the end of `import torch`, waits for DeepSpeed to be imported, and no more.

Standard library only, below a millisecond, and silent: an exception that leaves this module would make `import torch`
fail for every program of the environment. The hooks themselves (`plugin`) load with DeepSpeed's first submodule.
`DS4SCI_DISABLE=1` turns this off, as does torch's own `TORCH_DEVICE_BACKEND_AUTOLOAD=0`; after the latter an explicit
`import deepspeed_ds4sci` does the same work.
"""

import os
import sys

# Our own builder pulls DeepSpeed in half way through its import; the hooks have to be there by then.
_PREFIXES = ("deepspeed.", "deepspeed_ds4sci.op_builder.")


def disabled_by_environment():
    """True if DS4SCI_DISABLE is set to anything but an empty string or 0."""
    return os.environ.get("DS4SCI_DISABLE", "") not in ("", "0")


def register():
    """Makes the hooks load with DeepSpeed, at once if that is imported, unless DS4SCI_DISABLE is set.

    Never raises; a second call changes nothing.
    """
    if disabled_by_environment():
        return
    if "deepspeed.ops" in sys.modules:
        _enable_hooks()
    elif _trigger not in sys.meta_path and "deepspeed_ds4sci.plugin" not in sys.modules:
        sys.meta_path.insert(0, _trigger)


def unregister():
    """Stops waiting for DeepSpeed."""
    if _trigger in sys.meta_path:
        sys.meta_path.remove(_trigger)


def _enable_hooks():
    """Turns the hooks on and returns their module; None if it does not load, which leaves DeepSpeed as it is."""
    try:
        from deepspeed_ds4sci import plugin

        plugin.enable()
        return plugin
    except Exception as error:
        import logging

        logging.getLogger("deepspeed_ds4sci").warning("the hooks into DeepSpeed could not be loaded: %r", error)
        return None


class _Trigger:
    """A sys.meta_path entry that finds nothing itself: it turns the hooks on and steps aside."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if not name.startswith(_PREFIXES):
            return None
        unregister()
        plugin = _enable_hooks()
        # The module that set this off may be one of the hooked ones.
        return None if plugin is None else plugin.find_spec(name, path, target)


_trigger = _Trigger()

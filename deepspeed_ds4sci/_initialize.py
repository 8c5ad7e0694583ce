# SPDX-License-Identifier: Apache-2.0
"""The explicit form of what the plug-in does for a plain `deepspeed.initialize`."""


def initialize(*args, **kwargs):
    """deepspeed.initialize, with the `ds4sci` block of the config applied.

    Same arguments and the same four results. The work is done by the hooks that the plug-in puts into DeepSpeed, so a
    block applies once, however it is reached.

    Raises:
        RuntimeError: the hooks are off, by DS4SCI_DISABLE or because of DeepSpeed's version.
        ValueError, NotImplementedError: see `deepspeed_ds4sci.config` and the hooks.
    """
    import deepspeed

    from deepspeed_ds4sci import plugin

    plugin.enable()
    if not plugin.enabled():
        raise RuntimeError(
            "deepspeed_ds4sci.initialize needs the hooks into DeepSpeed, which are off: DS4SCI_DISABLE is set or "
            f"DeepSpeed is not {plugin.SUPPORTED_DEEPSPEED}"
        )
    return deepspeed.initialize(*args, **kwargs)

# SPDX-License-Identifier: Apache-2.0
"""Science kernels for DeepSpeed.

Importing this package runs the standard library only: torch imports it by itself (see `_autoload`), so it must stay
cheap. Public names are resolved on first access. The import also registers the lazy hooks into DeepSpeed, which makes
`import deepspeed_ds4sci` the explicit form of the autoload where that is switched off.
"""

import importlib

from deepspeed_ds4sci import _autoload

_PUBLIC = {
    "__version__": "deepspeed_ds4sci._version",
    "evoformer_attention": "deepspeed_ds4sci.ops.evoformer_attention",
    "DS4Sci_EvoformerAttention": "deepspeed_ds4sci.compat",
    "initialize": "deepspeed_ds4sci._initialize",
    "enable": "deepspeed_ds4sci.plugin",
    "disable": "deepspeed_ds4sci.plugin",
}
_SUBMODULES = ("models", "nn", "ops", "sequence")

__all__ = [*_PUBLIC, *_SUBMODULES]


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deepspeed_ds4sci import _logging

    _logging.attach_handler()
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value  # the next access is a plain attribute
    return value


def __dir__():
    return sorted({*globals(), *__all__})


_autoload.register()

# SPDX-License-Identifier: Apache-2.0
"""Every hook into DeepSpeed: `enable()`, `disable()`, and the table HOOKS. Those around training are functions of
`_training_hooks`.

A hook runs right after DeepSpeed's module of that name has been imported, or at once if it was imported earlier.
Nothing is touched before DeepSpeed is used, and the top module `deepspeed` never is: its import may be running while
torch loads this plug-in. Importing this module runs the standard library only.

With the hooks on, DeepSpeed's own names for the Evoformer attention op lead here:

- `deepspeed.ops.op_builder.EvoformerAttnBuilder` and what the accelerator objects hand out under that name;
- the `evoformer_attn` row of `ds_report`, on the CPU accelerator too, and `deepspeed.ops.__compatible_ops__`;
- `deepspeed.ops.deepspeed4science.DS4Sci_EvoformerAttention`.
"""

import functools
import importlib
import logging
import sys

from deepspeed_ds4sci import _autoload, _logging, _training_hooks

logger = logging.getLogger(__name__)

SUPPORTED_DEEPSPEED = ">=0.19.8,<0.20"

_BUILDER = "EvoformerAttnBuilder"
_BUILDER_MODULE = "deepspeed_ds4sci.op_builder.evoformer_attn"
_BASE = "DS4SciOpBuilder"
_BASE_MODULE = "deepspeed_ds4sci.op_builder.builder"
_OP = "DS4Sci_EvoformerAttention"
_OP_MODULE = "deepspeed.ops.deepspeed4science.evoformer_attn"
_ROW = "evoformer_attn"

_MISSING = object()


class _State:
    """What the hooks have done in this process."""

    def __init__(self):
        self.enabled = False
        self.announced = False
        self.version_ok = None  # None: DeepSpeed has not been seen yet
        self.replaced = {}  # (id of container, key) -> (container, key, original)


_state = _State()


def enable():
    """Installs the hooks. Nothing happens if they are on already, or if DS4SCI_DISABLE is set."""
    if _autoload.disabled_by_environment():
        logger.warning("DS4SCI_DISABLE is set: the hooks into DeepSpeed stay off")
        return
    if _state.enabled:
        return
    _logging.attach_handler()
    _autoload.unregister()
    _state.enabled = True
    sys.meta_path.insert(0, _finder)
    _apply_to_imported()


def disable():
    """Removes the hooks and puts DeepSpeed's own objects back. Nothing happens if they are off already.

    Functions that were imported from `deepspeed.ops.deepspeed4science` before hand their calls on to DeepSpeed's.
    """
    _autoload.unregister()
    if not _state.enabled:
        return
    _state.enabled = False
    sys.meta_path.remove(_finder)
    for container, key, original in reversed(_state.replaced.values()):
        _write(container, key, original)
    _state.replaced.clear()
    _rebind_builders()


def enabled():
    """Whether the hooks are installed and DeepSpeed, if it has been imported, is of a supported version."""
    return _state.enabled and _state.version_ok is not False


def announce():
    """Says once per process, in one log line, that the op in use is not DeepSpeed's own."""
    if _state.announced or not enabled():
        return
    _state.announced = True
    from deepspeed_ds4sci._version import __version__

    logger.info(
        "DeepSpeed's Evoformer attention op is provided by deepspeed_ds4sci %s (DS4SCI_DISABLE=1 brings back its own)",
        __version__,
    )


# ---- replacing and putting back -------------------------------------------------------------------------------------


def _entries(container):
    """The dict behind a dict, module or class. Reading it never runs a module's __getattr__."""
    return container if isinstance(container, dict) else vars(container)


def _write(container, key, value):
    if value is _MISSING:
        if key in _entries(container):
            container.pop(key) if isinstance(container, dict) else delattr(container, key)
    elif isinstance(container, dict):
        container[key] = value
    else:
        setattr(container, key, value)


def _remember(container, key, original):
    """What disable() puts back: the first thing that stood there."""
    _state.replaced.setdefault((id(container), key), (container, key, original))


def _replace(container, key, value):
    """Puts `value` in place of an attribute or dict entry until disable()."""
    _remember(container, key, _entries(container).get(key, _MISSING))
    _write(container, key, value)


# ---- the hooks ------------------------------------------------------------------------------------------------------


def _builder_class():
    """Our builder, or None while one of its modules is itself being imported (which is what imports DeepSpeed then).

    A module that another thread is importing is not waited for: that thread waits for DeepSpeed, which is being
    imported here.
    """
    for name, last in ((_BUILDER_MODULE, _BUILDER), (_BASE_MODULE, _BASE)):
        if name in sys.modules and not hasattr(sys.modules[name], last):
            return None
    return getattr(importlib.import_module(_BUILDER_MODULE), _BUILDER)


def _hook_accelerator(module):
    """cpu_accelerator and cuda_accelerator: hand out our builder under DeepSpeed's name for it."""
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__ and hasattr(cls, "get_op_builder"):
            _hook_accelerator_class(cls)


def _hook_accelerator_class(cls):
    get_original, create_original = cls.get_op_builder, cls.create_op_builder

    def get_op_builder(self, class_name):
        builder = _ours_or_none(class_name)
        return get_original(self, class_name) if builder is None else builder

    def create_op_builder(self, class_name):
        builder = _ours_or_none(class_name)
        return create_original(self, class_name) if builder is None else builder()

    _replace(cls, "get_op_builder", get_op_builder)
    _replace(cls, "create_op_builder", create_op_builder)


def _ours_or_none(class_name):
    if class_name != _BUILDER:
        return None
    try:
        return _builder_class()
    except Exception as error:
        logger.warning("DeepSpeed's own Evoformer attention builder stays in place: %r", error)
        return None


def _accelerator_is_hooked():
    """Only the CPU and CUDA accelerators hand out our builder; another one keeps DeepSpeed's names as they are."""
    from deepspeed.accelerator import get_accelerator

    # An accelerator's module is named after it, in DeepSpeed and in packages that bring their own.
    return f"deepspeed.accelerator.{get_accelerator()._name}_accelerator" in HOOKS


def _hook_op_builder(module):
    """deepspeed.ops.op_builder binds the builders once, at import: bind ours where that was earlier."""
    builder = _builder_class()
    if builder is not None and _accelerator_is_hooked():
        setattr(module, _BUILDER, builder)  # put back by _rebind_builders


def _hook_all_ops(module):
    """The rows of ds_report. The scan for the CPU accelerator leaves our op out."""
    builder = _builder_class()
    if builder is not None and _accelerator_is_hooked():
        module.ALL_OPS[_ROW] = builder()  # put back by _rebind_builders


def _rebind_builders():
    """After disable(): asks the accelerator, which is DeepSpeed's own again, for what it would have handed out."""
    if _BUILDER_MODULE not in sys.modules or "deepspeed.ops.op_builder" not in sys.modules:
        return
    from deepspeed.accelerator import get_accelerator

    ours, own = _builder_class(), get_accelerator().get_op_builder(_BUILDER)
    for name in ("deepspeed.ops.op_builder", _OP_MODULE):
        module = sys.modules.get(name)
        if getattr(module, _BUILDER, None) is ours:
            setattr(module, _BUILDER, own)
    all_ops = sys.modules.get("deepspeed.ops.op_builder.all_ops")
    if all_ops is not None and isinstance(all_ops.ALL_OPS.get(_ROW), ours):
        del all_ops.ALL_OPS[_ROW]
        if own is not None and own.NAME == _ROW:
            all_ops.ALL_OPS[_ROW] = own()


def _hook_git_version_info(module):
    """ds_report's "installed" column: yes if our library was built with the package.

    DeepSpeed trusts that table only while the accelerator named beside it, the one of the machine where its wheel was
    made, is the current one. If it is not, every entry means "not installed"; ours is then entered under the current
    accelerator and the others as not installed, which leaves their meaning as it was.
    """
    builder = _builder_class()
    # No GPU is asked about here: this runs at every `import deepspeed`.
    if builder is None or builder().fitting_prebuilt(capabilities=())[0] is None:
        return
    from deepspeed.accelerator import get_accelerator

    current = get_accelerator()._name
    if module.accelerator_name != current:
        for name in module.installed_ops:
            _replace(module.installed_ops, name, False)
        _replace(module, "accelerator_name", current)
    _replace(module.installed_ops, _ROW, True)


def _hook_ops(module):
    """`deepspeed.ops.__compatible_ops__`, by which callers decide whether to use the op at all.

    Ours runs everywhere, without its compiled library too, so it is always available. Whether the library can be
    compiled is what ds_report and `EvoformerAttnBuilder.is_compatible` say.
    """
    original = module._probe_compatible_ops

    def probe_compatible_ops():
        return {**original(), _ROW: True}

    _replace(module, "_probe_compatible_ops", probe_compatible_ops)
    if "__compatible_ops__" in vars(module):
        _replace(module.__compatible_ops__, _ROW, True)
    else:
        _remember(module, "__compatible_ops__", _MISSING)  # probed and kept later, with our row


def _hook_deepspeed4science(module):
    """The import path of OpenFold, OpenFold3 and Protenix; the package takes the name over from its submodule."""
    if module.__name__ == _OP_MODULE:
        _hook_op_builder(module)  # bound there too, and what it loaded is kept
        _replace(module, "kernel_", None)
    current = getattr(module, _OP)
    own = getattr(current, "deepspeed_own", current)
    _remember(module, _OP, own)
    _write(module, _OP, _announced_op(own))


def _announced_op(own):
    """Our op under DeepSpeed's name: announced at the first call, and DeepSpeed's again after disable()."""
    import torch

    from deepspeed_ds4sci import compat

    ours = compat.DS4Sci_EvoformerAttention
    # Under torch.compile the line is logged while tracing, and leaves no break in the graph.
    announce_once = torch.compiler.assume_constant_result(announce)

    @functools.wraps(ours)
    def DS4Sci_EvoformerAttention(Q, K, V, biases):
        if not _state.enabled:
            return own(Q, K, V, biases)
        announce_once()
        return ours(Q, K, V, biases)

    DS4Sci_EvoformerAttention.deepspeed_own = own
    return DS4Sci_EvoformerAttention


def _hook_own_builder(module):
    """A module of our builder was imported first and pulled in DeepSpeed, which could not have the class yet."""
    for name in ("deepspeed.ops.op_builder", "deepspeed.ops.op_builder.all_ops", "deepspeed.git_version_info"):
        if name in sys.modules and not _being_imported(sys.modules[name]):
            _run_hook(name, sys.modules[name])


def _being_imported(module):
    """Whether the module's own code is still running; its hook runs afterwards."""
    return getattr(module.__spec__, "_initializing", False)


HOOKS = {
    "deepspeed.accelerator.cpu_accelerator": _hook_accelerator,
    "deepspeed.accelerator.cuda_accelerator": _hook_accelerator,
    "deepspeed.ops.op_builder": _hook_op_builder,
    "deepspeed.ops.op_builder.all_ops": _hook_all_ops,
    "deepspeed.ops": _hook_ops,
    _OP_MODULE: _hook_deepspeed4science,
    "deepspeed.ops.deepspeed4science": _hook_deepspeed4science,
    "deepspeed.git_version_info": _hook_git_version_info,
    _BASE_MODULE: _hook_own_builder,
    _BUILDER_MODULE: _hook_own_builder,
    **{name: functools.partial(hook, _replace) for name, hook in _training_hooks.HOOKS.items()},
}


# ---- running them at the right moment -------------------------------------------------------------------------------


def _run_hook(name, module):
    """Runs the hook of a module that has just been imported. Never raises."""
    try:
        if name.startswith("deepspeed.") and not _version_supported():
            return
        HOOKS[name](module)
    except Exception as error:
        logger.warning("the hook on %s failed, DeepSpeed's own op stays in place there: %r", name, error)


def _version_supported():
    """Whether DeepSpeed is of a supported version; if not, says so once."""
    if _state.version_ok is None:
        from packaging.specifiers import SpecifierSet

        version = _deepspeed_version()
        _state.version_ok = version is not None and SpecifierSet(SUPPORTED_DEEPSPEED).contains(
            version, prereleases=True
        )
        if not _state.version_ok:
            logger.warning(
                "the hooks into DeepSpeed stay off: they support deepspeed%s, got %s",
                SUPPORTED_DEEPSPEED,
                version or "an unknown version",
            )
    return _state.version_ok


def _deepspeed_version():
    """The version of the DeepSpeed that is being imported, from the file that DeepSpeed itself takes it from."""
    try:
        return importlib.import_module("deepspeed.git_version_info_installed").version
    except ModuleNotFoundError:
        pass  # a source checkout, not installed
    try:
        from pathlib import Path

        checkout = Path(sys.modules["deepspeed"].__path__[0]).parent
        return (checkout / "version.txt").read_text().strip()
    except OSError:
        return None


def _apply_to_imported():
    for name in HOOKS:
        if name in sys.modules:
            _run_hook(name, sys.modules[name])


def find_spec(name, path=None, target=None):
    """Lets the other finders find a hooked module and wraps its loader; None for any other module."""
    if name not in HOOKS:
        return None
    for finder in sys.meta_path:
        spec = None if finder is _finder else finder.find_spec(name, path, target)
        if spec is not None:
            if spec.loader is not None:
                spec.loader = _HookedLoader(spec.loader)
            return spec
    return None


class _Finder:
    """First on sys.meta_path while the hooks are on."""

    find_spec = staticmethod(find_spec)


class _HookedLoader:
    """A module's own loader, with the hook run after the module's code."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        # copy and pickle look for special methods before there is a _loader to ask.
        if name == "_loader" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if _state.enabled:
            _run_hook(module.__name__, module)


_finder = _Finder()

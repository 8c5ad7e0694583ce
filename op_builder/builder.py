# SPDX-License-Identifier: Apache-2.0
"""DS4SciOpBuilder: our libraries behind the interface of DeepSpeed's op builders.

Imports nothing of DeepSpeed but its builder module, which is safe while DeepSpeed itself is being imported.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder

import deepspeed_ds4sci

from .compile import BuildError, build_library, planned_library, read_build_info, source_digest
from .gpus import query_driver, visible_gpus
from .library import NVCC_FLAGS, PREBUILT_PACKAGE, Library
from .nvcc import SEARCHED, find_ninja, find_nvcc
from .targets import parse_targets, requested_targets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildState:
    """Where the library would come from if it were loaded now."""

    kind: str
    """"prebuilt", "cached", "would compile" or "cannot"."""

    path: Path | None = None
    """The library; for "would compile" the file that does not exist yet."""

    reasons: tuple[str, ...] = ()
    """For "cannot": everything that is missing."""


def cache_root(name):
    """Folder for just-in-time builds of the library `name`: below DS4SCI_CACHE_DIR, else below torch's own folder for
    such builds (TORCH_EXTENSIONS_DIR or ~/.cache/torch_extensions)."""
    root = os.environ.get("DS4SCI_CACHE_DIR") or os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        root = Path(cache) / "torch_extensions"
    return Path(root) / name


def needed_capabilities(may_initialise_cuda=False):
    """Compute capabilities of the visible GPUs, without doubles.

    Args:
        may_initialise_cuda: ask CUDA itself where the driver's management library does not answer.
    """
    capabilities = {gpu.capability for gpu in visible_gpus()}
    if not capabilities and may_initialise_cuda and torch.cuda.is_available():
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return sorted(capabilities)


def _newest_cuda(version):
    """The newest CUDA version that the driver runs, as text, if it is too old for programs of `version`; else None."""
    driver = query_driver()
    # Within a major version, older drivers run what newer compilers made.
    if driver is None or version[0] <= driver.cuda_version[0]:
        return None
    return "{}.{}".format(*driver.cuda_version)


class DS4SciOpBuilder(CUDAOpBuilder):
    """Builds and loads one Library. A subclass sets LIBRARY and NAME and says how to bind the file.

    `load()` takes the library built with the package if it fits this machine, else compiles one and keeps it (see
    `cache_root`). Fits: made from the sources installed now, with code for every visible GPU that the op supports.
    """

    LIBRARY: Library
    NAME: str

    _loaded_libraries = {}

    def __init__(self, name=None):
        super().__init__(name=self.NAME if name is None else name)

    def bind(self, path):
        """Opens the compiled library and returns the object that callers use."""
        raise NotImplementedError

    def absolute_name(self):
        return f"{PREBUILT_PACKAGE}.{self.LIBRARY.name}"

    def sources(self):
        return [str(path) for path in self.LIBRARY.sources()]

    def include_paths(self):
        return [str(self.LIBRARY.include_dir())]

    def cxx_args(self):
        return []

    def nvcc_args(self):
        """The flags in full: DeepSpeed's own would add --use_fast_math."""
        gencode = [flag for target in self._targets(needed_capabilities()) for flag in target.gencode_flags()]
        return [*NVCC_FLAGS, *gencode]

    def is_compatible(self, verbose=False):
        """Whether this machine can run the compiled op. Never raises and never initialises CUDA.

        Args:
            verbose: print everything that is missing.
        """
        reasons = self.missing()
        if reasons and verbose:
            self.warning(f"{self.name}: " + "; ".join(reasons))
        return not reasons

    def missing(self):
        """Everything that keeps the compiled op from running here, as a list of texts; [] if nothing does."""
        try:
            return [*self._missing_to_run(), *self.build_state().reasons]
        except Exception as error:
            return [f"the check failed: {type(error).__name__}: {error}"]

    def _missing_to_run(self):
        if torch.version.hip is not None:
            return [f"PyTorch {torch.__version__} is a ROCm build; the kernels are for CUDA"]
        reasons = []
        if torch.version.cuda is None:
            reasons.append(f"PyTorch {torch.__version__} is a CPU build; install one with CUDA")
        gpus = visible_gpus()
        oldest = self.LIBRARY.min_capability
        if not gpus:
            reasons.append("no CUDA GPU is visible")
        elif all(gpu.capability < oldest for gpu in gpus):
            got = ", ".join("{} ({}.{})".format(gpu.name, *gpu.capability) for gpu in gpus)
            reasons.append("a GPU of compute capability {}.{} or newer is needed, got {}".format(*oldest, got))
        return reasons

    def build_state(self, capabilities=None):
        """Where the library would come from now. Compiles and loads nothing.

        Args:
            capabilities: those the library must serve; default: the visible GPUs'.
        """
        if capabilities is None:
            capabilities = needed_capabilities()
        prebuilt, unfit = self.fitting_prebuilt(capabilities)
        if prebuilt is not None:
            return BuildState("prebuilt", prebuilt)
        state = self._jit_state(capabilities)
        if state.kind == "cannot" and unfit:
            return BuildState("cannot", reasons=(f"the prebuilt library does not fit: {unfit}", *state.reasons))
        return state

    def _jit_state(self, capabilities):
        reasons = []
        nvcc, targets = find_nvcc(), []
        if nvcc is None:
            reasons.append(f"nvcc was not found in {SEARCHED}")
        if find_ninja() is None:
            reasons.append("ninja was not found; pip install ninja")
        try:
            targets = self._targets(capabilities)
        except ValueError as error:
            reasons.append(str(error))
        if nvcc is not None:
            reasons += self._missing_to_compile(nvcc, targets)
        if reasons:
            return BuildState("cannot", reasons=tuple(reasons))
        path = planned_library(self.LIBRARY, targets, nvcc, cache_root(self.LIBRARY.name))
        return BuildState("cached" if os.path.isfile(path) else "would compile", path)

    def _targets(self, capabilities):
        """What to compile for.

        Raises:
            ValueError: the list cannot be read, is empty, or leaves out a visible GPU.
        """
        targets = requested_targets(capabilities, self.LIBRARY.min_capability)
        for capability in self._supported(capabilities):
            if not any(target.runs_on(capability) for target in targets):
                raise ValueError(
                    "TORCH_CUDA_ARCH_LIST={} leaves out the visible GPU of compute capability {}.{}".format(
                        ";".join(map(str, targets)), *capability
                    )
                )
        return targets

    def _missing_to_compile(self, nvcc, targets):
        reasons = []
        version = "{}.{}".format(*nvcc.version)
        unsupported = nvcc.unsupported(targets)
        if unsupported:
            reasons.append(f"{nvcc.path} (CUDA {version}) cannot compile for {', '.join(map(str, unsupported))}")
        newest = _newest_cuda(nvcc.version)
        if newest is not None:
            reasons.append(f"the NVIDIA driver runs CUDA up to {newest}, too old for {nvcc.path} (CUDA {version})")
        return reasons

    def _supported(self, capabilities):
        return [capability for capability in capabilities if capability >= self.LIBRARY.min_capability]

    def fitting_prebuilt(self, capabilities):
        """The library built with the package.

        Args:
            capabilities: those it must serve; where there are none, the driver is not asked either.

        Returns:
            (path, ""), or (None, why it cannot be used), or (None, "") if there is none.
        """
        folder = Path(deepspeed_ds4sci.__file__).parent.joinpath(*PREBUILT_PACKAGE.split(".")[1:])
        path = folder / f"{self.LIBRARY.name}.so"
        if not path.is_file():
            return None, ""
        info = read_build_info(path)
        if info is None:
            return None, f"{path} is not a library of this package"
        if info["sources"] != source_digest(self.LIBRARY):
            return None, f"{path} was built from other sources than those installed now"
        targets = parse_targets(";".join(info["targets"]), self.LIBRARY.min_capability)
        for capability in self._supported(capabilities):
            if not any(target.runs_on(capability) for target in targets):
                names = ", ".join(info["targets"])
                return None, "{} was built for {}, not for compute capability {}.{}".format(path, names, *capability)
        newest = _newest_cuda(tuple(map(int, info["nvcc"].split(".")))) if capabilities else None
        if newest is not None:
            return None, f"{path} was built with CUDA {info['nvcc']}, the NVIDIA driver runs CUDA up to {newest}"
        return path, ""

    def load(self, verbose=False):
        """The bound library, opened once per process. Needs no GPU and no CUDA build of torch: running it does.

        Raises:
            BuildError: there is no fitting library and none can be compiled; names everything that is missing.
            TimeoutError: another process held the build too long.
        """
        name = self.LIBRARY.name
        if name not in self._loaded_libraries:
            capabilities = needed_capabilities(may_initialise_cuda=True)
            prebuilt, unfit = self.fitting_prebuilt(capabilities)
            if unfit:
                logger.warning("not using the prebuilt library: %s; reinstall to replace it", unfit)
            self._loaded_libraries[name] = self.jit_load(verbose) if prebuilt is None else self.bind(prebuilt)
        return self._loaded_libraries[name]

    def jit_load(self, verbose=True):
        """Compiles the library unless it is cached, and binds it. Raises as `load` does."""
        capabilities = needed_capabilities(may_initialise_cuda=True)
        state = self._jit_state(capabilities)
        if state.kind == "cannot":
            self.error_log = "; ".join(state.reasons)
            raise BuildError(f"cannot compile {self.LIBRARY.name}: {self.error_log}")
        targets = self._targets(capabilities)
        if state.kind == "would compile":
            logger.info("compiling %s for %s, once", self.LIBRARY.name, ", ".join(map(str, targets)))
        return self.bind(build_library(self.LIBRARY, targets, cache_root(self.LIBRARY.name)))

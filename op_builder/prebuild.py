# SPDX-License-Identifier: Apache-2.0
"""Building an op ahead of time: `DS4SCI_BUILD_EVOFORMER_ATTN=1 pip install --no-build-isolation .`

Used by setup.py only, before anything is installed, so nothing here imports torch or DeepSpeed.
"""

import os
import shutil

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from .compile import build_library
from .gpus import visible_gpus
from .library import LIBRARIES, PREBUILT_PACKAGE
from .targets import requested_targets


def requested_extensions():
    """Placeholder extensions, one per library whose DS4SCI_BUILD_* variable is 1; empty for a plain install."""
    return [
        Extension(f"{PREBUILT_PACKAGE}.{library.name}", sources=[])
        for library in LIBRARIES
        if os.environ.get(library.build_variable, "0") not in ("", "0")
    ]


class BuildOps(build_ext):
    """`build_ext` that compiles our libraries with nvcc in place of Python extension modules."""

    def get_ext_filename(self, fullname):
        # A plain C library: no interpreter tag in its name, since one file serves every Python version.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        library = next(item for item in LIBRARIES if ext.name.endswith(f".{item.name}"))
        targets = requested_targets([gpu.capability for gpu in visible_gpus()], library.min_capability)
        print(f"compiling {library.name} for {', '.join(map(str, targets))}")
        built = build_library(library, targets, os.path.join(self.build_temp, library.name))
        destination = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(destination), exist_ok=True)
        shutil.copy2(built, destination)

# SPDX-License-Identifier: Apache-2.0
"""The compiled library without its kernels (stub_library.cpp): for what happens around them, on any machine."""

import ctypes
import os
import subprocess
from pathlib import Path

from deepspeed_ds4sci.ops._extension import _PREFIXES, Extension
from deepspeed_ds4sci.ops._params import Params

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, *, with_sm90: bool = True) -> Path:
    """The library, compiled into `folder` in about a second. Needs g++ (or $CXX)."""
    library = folder / ("stub_sm90.so" if with_sm90 else "stub.so")
    subprocess.run(
        [
            *(os.environ.get("CXX", "g++"), "-O1", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Werror"),
            *(["-DDS4SCI_WITH_SM90"] if with_sm90 else []),
            *(f"-I{ROOT / 'csrc' / 'evoformer_attn'}", str(ROOT / "tests" / "helpers" / "stub_library.cpp")),
            *("-o", str(library)),
        ],
        check=True,
    )
    return library


class Record:
    """What the stub behind `extension` was told through one path."""

    def __init__(self, extension: Extension, path: str):
        self._library = ctypes.CDLL(str(extension.path))
        self._prefix = _PREFIXES[path]

    @property
    def calls(self) -> tuple[int, int]:
        """How often forward and backward were called."""
        forward, backward = (ctypes.c_int32 * 2).in_dll(self._library, f"{self._prefix}calls")
        return forward, backward

    @property
    def params(self) -> Params:
        """A copy of the parameters of the last call."""
        return Params.from_buffer_copy(Params.in_dll(self._library, f"{self._prefix}last"))

# SPDX-License-Identifier: Apache-2.0
"""Finding the CUDA compiler and asking it what it is. Works beside a CPU build of torch."""

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SEARCHED = "CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda"


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler that answered."""

    path: str
    version: tuple[int, int]
    banner: str
    """Full text of `nvcc --version`, part of every cache key."""

    archs: frozenset[str]
    """Architectures without suffix that it compiles for, as in {"80", "90", "100"}."""

    def unsupported(self, targets):
        """The targets that this compiler does not know."""
        return [target for target in targets if f"{target.major}{target.minor}" not in self.archs]


def find_nvcc():
    """The compiler from CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, in this order.

    Returns:
        Nvcc, or None if none of them holds one that runs.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    candidates.append(shutil.which("nvcc"))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            found = _describe(str(candidate))
            if found is not None:
                return found
    return None


@functools.cache
def _describe(path):
    try:
        banner = _output(path, "--version")
        archs = _output(path, "--list-gpu-arch")
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\d+)\.(\d+)", banner)
    if release is None:
        return None
    return Nvcc(
        path=path,
        version=(int(release[1]), int(release[2])),
        banner=banner,
        archs=frozenset(re.findall(r"compute_(\d+)", archs)),
    )


def _output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def find_ninja():
    """Path of the ninja program, from the Python package or PATH; None if there is none."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR, "ninja"))

# SPDX-License-Identifier: Apache-2.0
"""Running Python code in a process of its own, for whatever depends on import order or on the environment."""

import os
import subprocess
import sys
import tempfile
import textwrap

# Variables that would change what the tests look at; a test sets those it is about.
_OURS = (
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "DS4SCI_BUILD_EVOFORMER_ATTN",
    "DS4SCI_BUILD_TIMEOUT",
    "DS4SCI_CACHE_DIR",
    "DS4SCI_DISABLE",
    "DS_ACCELERATOR",
    "RANK",
    "TORCH_CUDA_ARCH_LIST",
    "TORCH_DEVICE_BACKEND_AUTOLOAD",
    "TORCH_EXTENSIONS_DIR",
)


def clean_environment(**variables):
    """The environment of a child process: this one's without the variables above, plus those given."""
    kept = {name: value for name, value in os.environ.items() if name not in _OURS}
    return {**kept, **{name: str(value) for name, value in variables.items()}}


def run_python(code, *, cwd=None, timeout=120, **variables):
    """Runs dedented code and returns what it printed on stdout and stderr together.

    Args:
        code: Python source.
        cwd: folder to run in, which Python puts first on sys.path; default: one that holds no code of ours.
        variables: environment variables to set.

    Raises:
        AssertionError: the code failed; the message holds its output.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=cwd or tempfile.gettempdir(),
        timeout=timeout,
        env=clean_environment(**variables),
    )
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout}"
    return done.stdout

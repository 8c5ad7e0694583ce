# SPDX-License-Identifier: Apache-2.0
"""Package map and the ops that can be built ahead of time. Metadata is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup

# PEP 517 front ends do not put the project folder on sys.path.
sys.path.insert(0, str(Path(__file__).parent))
from op_builder.prebuild import BuildOps, requested_extensions

setup(
    # Here and not in pyproject.toml, whose spelling of it changed: a fresh Python 3.11 comes with setuptools 65, and
    # an install without build isolation uses that.
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[
        *find_packages(include=["deepspeed_ds4sci", "deepspeed_ds4sci.*"]),
        "deepspeed_ds4sci.op_builder",
        "deepspeed_ds4sci.csrc",
        # Folders of data count as packages too.
        *(f"deepspeed_ds4sci.csrc.{name}" for name in find_namespace_packages("csrc", exclude=["*__pycache__*"])),
    ],
    # The two source folders keep their place at the root and become subpackages: a top-level `op_builder`
    # in site-packages would be mistaken for DeepSpeed's.
    package_dir={"deepspeed_ds4sci.op_builder": "op_builder", "deepspeed_ds4sci.csrc": "csrc"},
    package_data={"": ["*.h", "*.cuh", "*.cu"]},
    ext_modules=requested_extensions(),
    cmdclass={"build_ext": BuildOps},
)

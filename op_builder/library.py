# SPDX-License-Identifier: Apache-2.0
"""What gets compiled: the sources and flags of each library. Imports neither torch nor DeepSpeed."""

from dataclasses import dataclass
from pathlib import Path

# The Python package that a prebuilt library is placed in.
PREBUILT_PACKAGE = "deepspeed_ds4sci.ops"

# No --use_fast_math: numerics are stated in the kernels, never inherited from a flag.
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-lineinfo", "--expt-relaxed-constexpr")


def csrc_dir():
    """The folder that holds the CUDA sources: inside the package once installed, beside op_builder/ in a checkout.

    Raises:
        FileNotFoundError: the installation holds no CUDA sources.
    """
    here = Path(__file__).resolve().parent
    # deepspeed_ds4sci/op_builder -> deepspeed_ds4sci/csrc, and op_builder -> csrc: the same relation in both layouts.
    candidate = here.parent / "csrc"
    if not candidate.is_dir():
        raise FileNotFoundError(
            f"the CUDA sources are missing: expected the folder {candidate}; reinstall the package"
        )
    return candidate


@dataclass(frozen=True)
class Library:
    """A torch-free shared library with a C interface, built from one folder of csrc/."""

    name: str
    """File name without suffix, and cache key. Not an op name of DeepSpeed's, whose cache is shared by name."""

    folder: str
    """Folder under csrc/ with `api.cu`, `api_*.cu` and `instantiations/*.cu`; also the include folder."""

    build_variable: str
    """Environment variable that asks `pip install` to build the library ahead of time."""

    min_capability: tuple[int, int] = (8, 0)
    """Oldest compute capability that the kernels run on."""

    def include_dir(self):
        return csrc_dir() / self.folder

    def sources(self):
        """The .cu files to compile, api.cu first, in a fixed order.

        Raises:
            FileNotFoundError: api.cu is missing.
        """
        folder = self.include_dir()
        api = folder / "api.cu"
        if not api.is_file():
            raise FileNotFoundError(f"cannot build {self.name}: {api} is missing")
        return [api, *sorted(folder.glob("api_*.cu")), *sorted((folder / "instantiations").glob("*.cu"))]

    def headers(self):
        """Every file that a source may include, in a fixed order."""
        folder = self.include_dir()
        return sorted(path for suffix in ("*.h", "*.cuh") for path in folder.rglob(suffix))


EVOFORMER_ATTN = Library(
    name="ds4sci_evoformer_attn", folder="evoformer_attn", build_variable="DS4SCI_BUILD_EVOFORMER_ATTN"
)

LIBRARIES = (EVOFORMER_ATTN,)

# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels for the CPU emulator (emulated_device.h) with the system's C++ compiler."""

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "evoformer_attn"
EMULATOR = Path(__file__).resolve().parent
# -O1: the emulator's time goes into switching threads, and -O2 doubles the compile time.
FLAGS = [
    "-O1",
    "-std=c++17",
    "-fPIC",
    "-DDS4SCI_EMULATE",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
]


def build(folder: Path | None = None) -> Path:
    """The emulated library; compiled when no library of the same sources is there. Needs g++ (or $CXX)."""
    # Hopper's copy engine and warpgroup products have no counterpart here.
    instantiations = sorted((SOURCES / "instantiations").glob("*.cu"))
    units = [SOURCES / "api.cu", *(path for path in instantiations if not path.stem.endswith("_sm90"))]
    headers = [path for path in sorted(SOURCES.rglob("*")) if path.suffix in (".h", ".cuh")]
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in (*units, *headers, EMULATOR / "emulated_device.h"):
        digest.update(path.read_bytes())
    folder = (folder or ROOT / "build" / "emulator") / digest.hexdigest()[:16]
    library = folder / "libds4sci_emulated.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    scratch = folder / f"objects.{os.getpid()}"
    scratch.mkdir(exist_ok=True)

    def compile_unit(unit: Path) -> Path:
        target = scratch / (unit.stem + ".o")
        includes = [f"-I{SOURCES}", f"-I{EMULATOR}"]
        subprocess.run([compiler, *FLAGS, *includes, "-x", "c++", "-c", unit, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_unit, units))
    partial = scratch / library.name
    subprocess.run([compiler, "-shared", *objects, "-o", partial], check=True)
    partial.replace(library)  # atomic: another process may build the same library
    for leftover in objects:
        leftover.unlink()
    scratch.rmdir()
    return library

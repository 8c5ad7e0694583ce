# SPDX-License-Identifier: Apache-2.0
"""Prepares the peers of the benchmark for a GPU machine that cannot reach a package registry.

    python -m tests.benchmarks.prepare_peers            # here, where a registry and nvcc are: fills both folders
    python -m tests.benchmarks.prepare_peers install    # there: build/gpu-venv, with what is missing and this project

Two folders of the repository root, both ignored by git, are filled:

- `.whl/`: wheels of the peers and of what they need, for Linux x86-64.
- `.peers/`: DeepSpeed's own Evoformer attention, compiled from the *installed* DeepSpeed package and CUTLASS's
  headers (`nvidia-cutlass` wheel) without torch, so that one build serves every torch version. DeepSpeed's JIT build
  of the same files takes three architectures, both dtypes and torch's headers: longer than a timing run should wait.

Nothing of other projects enters this repository.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".whl"
LIBRARIES = ROOT / ".peers"
ENVIRONMENT = ROOT / "build" / "gpu-venv"
CUTLASS = "nvidia-cutlass==4.2.0.0"
DEEPSPEED = "deepspeed==0.19.8"

# What the peers and the tests import beyond torch, triton, numpy, scipy and matplotlib. Setup skips what is there.
SMALL_WHEELS = (
    "annotated-types",
    "einops",
    "hjson",
    "hypothesis",
    "iniconfig",
    "jaxtyping",
    "msgpack",
    "ninja",
    "packaging",
    "platformdirs",
    "pluggy",
    "psutil",
    "py-cpuinfo",
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "pygments",
    "pytest",
    "setuptools==80.9.0",
    "sortedcontainers",
    "tqdm",
    "trifast==0.1.13",
    "typing-extensions",
    "typing-inspection",
    "wadler-lindig",
)
# An older one counts as missing: the project file needs the first, pydantic the second.
OLDEST = {"setuptools": (77, 0), "typing_extensions": (4, 16)}
CUEQUIVARIANCE_WHEELS = (
    "cuequivariance==0.13.0",
    "cuequivariance-torch==0.13.0",
    "cuequivariance-ops-cu13==0.13.0",
    "cuequivariance-ops-torch-cu13==0.13.0",
    "nvidia-ml-py",
    "opt-einsum",
)
# pip matches the number in a platform tag exactly, so every usual one is named.
MANYLINUX = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17", "2014", "2010", "1", "2_12", "2_5")


def pip(*arguments: str, **environment: str) -> None:
    """Runs pip of this interpreter; raises CalledProcessError when it fails."""
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, env={**os.environ, **environment})


def download(folder: Path, requirements: tuple[str, ...], python: str) -> None:
    """Fetches one wheel per requirement, without what it needs, for `python` (as "3.12") on Linux x86-64."""
    tags = [f"manylinux{'' if number in ('2014', '2010', '1') else '_'}{number}_x86_64" for number in MANYLINUX]
    pip(
        *("download", "-q", "--no-deps", "--only-binary=:all:", "--implementation", "cp"),
        *("--python-version", python, "-d", str(folder)),
        *(word for tag in tags for word in ("--platform", tag)),
        *requirements,
    )


def recompress(wheel: Path) -> None:
    """Rewrites a wheel with LZMA members, which pip reads as well. GPU libraries shrink to less than half."""
    packed = wheel.with_suffix(".packed")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    packed.replace(wheel)


def prepare_wheels(folder: Path, python: str, with_cuequivariance: bool) -> None:
    """Fills `folder` anew with one version of each wheel."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    download(folder, SMALL_WHEELS, python)
    # DeepSpeed comes as source; without its ops the wheel is pure Python.
    build = ("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), DEEPSPEED)
    pip(*build, DS_BUILD_OPS="0")
    if with_cuequivariance:
        download(folder, CUEQUIVARIANCE_WHEELS, python)
        for wheel in folder.glob("cuequivariance_ops*.whl"):
            recompress(wheel)


def deepspeed_sources() -> Path:
    """Folder of the op's CUDA files in the installed DeepSpeed."""
    spec = find_spec("deepspeed")
    if spec is None or spec.origin is None:
        raise SystemExit(f"DeepSpeed is not installed; run: pip install {DEEPSPEED}")
    return Path(spec.origin).parent / "ops" / "csrc" / "deepspeed4science" / "evoformer_attn"


def cutlass_includes(folder: Path) -> list[Path]:
    """CUTLASS's include folders, out of the wheel `nvidia-cutlass`, unpacked under `folder`."""
    download(folder, (CUTLASS,), "3.12")
    with zipfile.ZipFile(next(folder.glob("nvidia_cutlass*.whl"))) as wheel:
        wheel.extractall(folder)
    source = folder / "cutlass_library" / "source"
    return [source / "include", source / "tools" / "util" / "include"]


def prepare_library(folder: Path, dtype: str, arch: str) -> Path:
    """Compiles DeepSpeed's forward and backward for one dtype ("fp16", "bf16") and one architecture ("90").

    Takes about 5 CPU-minutes. The flags are DeepSpeed's own (op_builder/builder.py, CUDAOpBuilder.nvcc_args).
    """
    here = Path(__file__).resolve().parent / "deepspeed_op"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"libdeepspeed_evoformer_{dtype}_sm{arch}.so"
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        includes = [here / "stand_in", here, deepspeed_sources(), *cutlass_includes(scratch)]
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        flags = [
            *("-O3", "--use_fast_math", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", target),
            *("-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_HALF2_OPERATORS__"),
            *("-diag-suppress", "20013,20015"),
            f"-DDS4SCI_PEER_DTYPE={('fp16', 'bf16').index(dtype)}",
            *(f"-I{include}" for include in includes),
        ]
        for name in ("forward", "backward"):
            print(f"compiling DeepSpeed's {name}, {dtype}, sm_{arch}", flush=True)
            subprocess.run(["nvcc", *flags, "-c", here / f"{name}.cu", "-o", scratch / f"{name}.o"], check=True)
        objects = [scratch / "forward.o", scratch / "backward.o"]
        link = ["nvcc", "-shared", target, "-cudart", "static", "-Xlinker", "-s", *objects, "-o", library]
        subprocess.run(link, check=True)
    return library


def is_missing(wheel: Path) -> bool:
    """Whether the project of a wheel file is not installed, or is too old to use."""
    name = wheel.name.split("-")[0]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return name in OLDEST and tuple(int(number) for number in version.split(".")[:2]) < OLDEST[name]


def create_environment(folder: Path) -> Path:
    """A virtual environment on top of this interpreter's packages, which it leaves as they are; returns its Python."""
    venv.create(folder, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Not system_site_packages: from inside a virtual environment that would pass over its packages.
    (site / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    return folder / "bin" / "python"


def install(wheels: Path, folder: Path = ENVIRONMENT) -> None:
    """Creates `folder` with the wheels that are missing and this project in editable form; asks no registry.

    If one wheel does not install, the others still do: a peer without it becomes a missing result.
    """
    python = create_environment(folder)
    offline = (str(python), "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
    missing = [wheel for wheel in sorted(wheels.glob("*.whl")) if is_missing(wheel)]
    if missing and subprocess.run([*offline, "--upgrade", *missing]).returncode != 0:
        for wheel in missing:
            if subprocess.run([*offline, "--upgrade", wheel]).returncode != 0:
                print(f"COULD NOT INSTALL {wheel.name}", flush=True)
    print("asked for:", *("-".join(wheel.name.split("-")[:2]) for wheel in missing))
    subprocess.run([*offline, "--no-build-isolation", "-e", str(ROOT)], check=True)
    print(f"ready: {python}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="wheels, library (default: both), or install")
    parser.add_argument("--python", default="3.12", help="Python version of the GPU machine")
    parser.add_argument("--dtypes", default="bf16", help="comma-separated, of fp16 and bf16")
    parser.add_argument("--arch", default="90", help="compute capability of its GPU, without the dot")
    parser.add_argument("--no-cuequivariance", action="store_true", help="leave out the one large peer (27 MB)")
    options = parser.parse_args()
    parts = options.parts or ["wheels", "library"]
    if not set(parts) <= {"wheels", "library", "install"}:
        parser.error(f"parts are wheels, library and install; got {' '.join(parts)}")
    if "install" in parts:
        install(WHEELS)
        return
    if "wheels" in parts:
        prepare_wheels(WHEELS, options.python, not options.no_cuequivariance)
    if "library" in parts:
        for dtype in options.dtypes.split(","):
            prepare_library(LIBRARIES, dtype, options.arch)
    for folder in (WHEELS, LIBRARIES):
        size = sum(path.stat().st_size for path in folder.glob("*")) if folder.exists() else 0
        print(f"{folder.relative_to(ROOT)}/: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

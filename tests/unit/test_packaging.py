# SPDX-License-Identifier: Apache-2.0
"""What `pip install` puts where: the wheel's contents, and the ahead-of-time build with a stand-in for nvcc."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deepspeed_ds4sci.op_builder.compile import read_build_info
from deepspeed_ds4sci.op_builder.library import csrc_dir
from tests.helpers.fake_nvcc import FakeNvcc
from tests.helpers.processes import clean_environment, run_python

REPOSITORY = csrc_dir().parent
LIBRARY = "deepspeed_ds4sci/ops/ds4sci_evoformer_attn.so"

pytestmark = pytest.mark.skipif(
    not (REPOSITORY / "setup.py").is_file(), reason="the package is installed, not a checkout"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the wheel is made from, so that building leaves no traces in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("deepspeed_ds4sci", "op_builder", "csrc"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=unwanted)
    for path in REPOSITORY.iterdir():
        if path.name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
            shutil.copy(path, copy)
    return copy


def pip_wheel(checkout, folder, **variables):
    """Builds a wheel into `folder`. Returns pip's exit code and output."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "-w", str(folder), str(checkout)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_environment(**variables),
        timeout=300,
    )
    return done.returncode, done.stdout


def unpack(folder):
    """Unpacks the one wheel of a folder; returns its name and the folder to put on PYTHONPATH."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return wheel.name, folder / "site"


@pytest.fixture(scope="module")
def plain(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    status, output = pip_wheel(checkout, folder)
    assert status == 0, output
    return unpack(folder)


@pytest.fixture(scope="module")
def prebuilt(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prebuilt")
    nvcc = FakeNvcc(folder / "cuda")
    status, output = pip_wheel(
        checkout, folder, DS4SCI_BUILD_EVOFORMER_ATTN=1, TORCH_CUDA_ARCH_LIST="8.0;9.0a", CUDA_HOME=nvcc.home
    )
    assert status == 0, output
    return unpack(folder)


def files(folder, *suffixes):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in suffixes}


def test_wheel_is_pure_and_has_the_sources(plain):
    name, site = plain
    assert name.endswith("-py3-none-any.whl")
    assert files(site / "deepspeed_ds4sci" / "csrc", ".cu", ".cuh", ".h") == files(csrc_dir(), ".cu", ".cuh", ".h")
    assert files(site / "deepspeed_ds4sci" / "op_builder", ".py") == files(REPOSITORY / "op_builder", ".py")
    assert files(site, ".so") == set()


def test_wheel_has_no_top_level_op_builder(plain):
    """DeepSpeed would take it for its own."""
    assert {path.name.partition("-")[0] for path in plain[1].iterdir()} == {"deepspeed_ds4sci"}


def test_wheel_registers_the_entry_point(plain):
    (metadata,) = plain[1].glob("*.dist-info")
    text = (metadata / "entry_points.txt").read_text()
    assert text.split() == ["[torch.backends]", "deepspeed_ds4sci", "=", "deepspeed_ds4sci._autoload:register"]
    requirements = (metadata / "METADATA").read_text()
    assert "Requires-Dist: deepspeed<0.20,>=0.19.8" in requirements
    assert "Requires-Python: >=3.10" in requirements
    assert (metadata / "licenses" / "LICENSE").is_file()


def test_installed_package_finds_its_sources(plain):
    output = run_python(
        """
        from deepspeed_ds4sci.op_builder.library import EVOFORMER_ATTN
        print(EVOFORMER_ATTN.sources()[0])
        """,
        PYTHONPATH=plain[1],
    )
    assert Path(output.strip()) == plain[1] / "deepspeed_ds4sci" / "csrc" / "evoformer_attn" / "api.cu"


def test_prebuilt_wheel(prebuilt):
    name, site = prebuilt
    assert "none-any" not in name
    assert files(site, ".so") == {LIBRARY}
    assert read_build_info(site / LIBRARY)["targets"] == ["8.0", "9.0a"]


def test_prebuilt_library_is_found_after_installation(prebuilt):
    output = run_python(
        """
        from deepspeed_ds4sci.op_builder.evoformer_attn import EvoformerAttnBuilder
        print(EvoformerAttnBuilder().build_state([(8, 6), (9, 0)]))
        print(EvoformerAttnBuilder().fitting_prebuilt([(12, 0)])[1])
        """,
        PYTHONPATH=prebuilt[1],
    )
    assert f"BuildState(kind='prebuilt', path=PosixPath('{prebuilt[1] / LIBRARY}')" in output
    assert "was built for 8.0, 9.0a, not for compute capability 12.0" in output


def test_prebuild_needs_an_architecture(checkout, tmp_path):
    nvcc = FakeNvcc(tmp_path / "cuda")
    status, output = pip_wheel(
        checkout, tmp_path, DS4SCI_BUILD_EVOFORMER_ATTN=1, CUDA_HOME=nvcc.home, TORCH_CUDA_ARCH_LIST="7.5"
    )
    assert status != 0
    assert "TORCH_CUDA_ARCH_LIST must name an architecture from 8.0 on, got '7.5'" in output


@pytest.mark.parametrize(("value", "count"), [("1", 1), ("0", 0), ("", 0)])
def test_the_variable_decides(monkeypatch, value, count):
    from deepspeed_ds4sci.op_builder.prebuild import requested_extensions

    monkeypatch.setenv("DS4SCI_BUILD_EVOFORMER_ATTN", value)
    assert len(requested_extensions()) == count

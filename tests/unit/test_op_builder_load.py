# SPDX-License-Identifier: Apache-2.0
"""EvoformerAttnBuilder: what it says is missing, where it takes the library from, and when."""

import logging

import pytest
import torch
from deepspeed.ops.op_builder.builder import OpBuilder

from deepspeed_ds4sci.op_builder import builder as builder_module
from deepspeed_ds4sci.op_builder.builder import DS4SciOpBuilder, cache_root
from deepspeed_ds4sci.op_builder.compile import BuildError, build_library
from deepspeed_ds4sci.op_builder.evoformer_attn import EvoformerAttnBuilder
from deepspeed_ds4sci.op_builder.gpus import Driver, Gpu
from deepspeed_ds4sci.op_builder.library import EVOFORMER_ATTN
from deepspeed_ds4sci.op_builder.targets import parse_targets
from tests.helpers.fake_nvcc import FakeNvcc, write_sources
from tests.helpers.processes import run_python

H100 = Gpu("H100", "GPU-1", (9, 0))
A100 = Gpu("A100", "GPU-2", (8, 0))
V100 = Gpu("V100", "GPU-3", (7, 0))


class Machine:
    """A machine made up for the test: its GPUs, driver, torch, compiler and prebuilt library."""

    def __init__(self, tmp_path, monkeypatch):
        self.tmp_path, self.monkeypatch = tmp_path, monkeypatch
        self.library = write_sources(tmp_path / "csrc")
        self.nvcc = FakeNvcc(tmp_path / "cuda")
        self.package = tmp_path / "package"
        (self.package / "ops").mkdir(parents=True)
        monkeypatch.setenv("CUDA_HOME", str(self.nvcc.home))
        monkeypatch.setenv("DS4SCI_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        monkeypatch.setattr(builder_module.deepspeed_ds4sci, "__file__", str(self.package / "__init__.py"))
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        self.set_torch("13.0")
        self.set_gpus(H100)
        self.set_driver((13, 0))

    def set_torch(self, cuda):
        self.monkeypatch.setattr(torch.version, "cuda", cuda)

    def set_gpus(self, *gpus):
        self.monkeypatch.setattr(builder_module, "visible_gpus", lambda: list(gpus))

    def set_driver(self, cuda_version):
        self.monkeypatch.setattr(builder_module, "query_driver", lambda: Driver(cuda_version, ()))

    def remove(self, tool):
        self.monkeypatch.setattr(builder_module, f"find_{tool}", lambda: None)

    def prebuild(self, targets):
        built = build_library(self.library, parse_targets(targets), self.tmp_path / "prebuild")
        path = self.package / "ops" / f"{self.library.name}.so"
        path.write_bytes(built.read_bytes())
        return path

    def builder(self):
        class Builder(EvoformerAttnBuilder):
            LIBRARY = self.library
            _loaded_libraries = {}

            def bind(self, path):
                return path

        return Builder()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def test_names():
    builder = EvoformerAttnBuilder()
    assert builder.name == EvoformerAttnBuilder.NAME == "evoformer_attn"
    assert isinstance(builder, OpBuilder)
    assert issubclass(EvoformerAttnBuilder, DS4SciOpBuilder)
    assert builder.absolute_name() == f"deepspeed_ds4sci.ops.{EVOFORMER_ATTN.name}"
    assert [path.rpartition("/")[2] for path in builder.sources()][0] == "api.cu"
    assert builder.include_paths() == [str(EVOFORMER_ATTN.include_dir())]


def test_compatible(machine, capsys):
    assert machine.builder().missing() == []
    assert machine.builder().is_compatible(verbose=True)
    assert capsys.readouterr().out == ""


def test_flags_have_no_fast_math(machine):
    flags = machine.builder().nvcc_args()
    assert "--use_fast_math" not in flags
    assert "-gencode=arch=compute_90a,code=sm_90a" in flags
    assert machine.builder().cxx_args() == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.set_torch(None), "is a CPU build; install one with CUDA"),
        (lambda m: m.monkeypatch.setattr(torch.version, "hip", "6.0"), "is a ROCm build; the kernels are for CUDA"),
        (lambda m: m.set_gpus(), "no CUDA GPU is visible"),
        (lambda m: m.set_gpus(V100), "a GPU of compute capability 8.0 or newer is needed, got V100 (7.0)"),
        (lambda m: m.remove("nvcc"), "nvcc was not found in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda"),
        (lambda m: m.remove("ninja"), "ninja was not found; pip install ninja"),
        (lambda m: m.monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper"), "must list architectures"),
        (
            lambda m: m.monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;8.6"),
            "TORCH_CUDA_ARCH_LIST=8.0;8.6 leaves out the visible GPU of compute capability 9.0",
        ),
        (lambda m: m.monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0;11.0"), "(CUDA 12.9) cannot compile for 11.0"),
        (lambda m: m.set_driver((11, 8)), "the NVIDIA driver runs CUDA up to 11.8, too old for"),
    ],
)
def test_what_is_missing_is_said(machine, capsys, change, expected):
    change(machine)
    builder = machine.builder()
    assert expected in "; ".join(builder.missing())
    assert not builder.is_compatible()
    assert capsys.readouterr().out == ""
    assert not builder.is_compatible(verbose=True)
    assert f"evoformer_attn: {builder.missing()[0]}" in capsys.readouterr().out


def test_everything_that_is_missing_is_said(machine):
    machine.set_torch(None)
    machine.set_gpus()
    machine.remove("nvcc")
    assert len(machine.builder().missing()) == 4  # those three, and no architecture to compile for


def test_check_never_raises(machine):
    def broken():
        raise RuntimeError("driver and library versions differ")

    machine.monkeypatch.setattr(builder_module, "visible_gpus", broken)
    assert machine.builder().missing() == ["the check failed: RuntimeError: driver and library versions differ"]
    assert not machine.builder().is_compatible()


def test_check_creates_no_cuda_context():
    """A process that has touched CUDA can no longer fork; importing DeepSpeed and asking must not do that to it."""
    run_python("""
        import deepspeed, torch
        from deepspeed.ops.op_builder import EvoformerAttnBuilder
        EvoformerAttnBuilder().is_compatible(verbose=True)
        deepspeed.ops.__compatible_ops__
        assert not torch.cuda.is_initialized()
    """)


def test_prebuilt_needs_no_compiler(machine):
    path = machine.prebuild("9.0a")
    machine.remove("nvcc")
    machine.remove("ninja")
    assert machine.builder().missing() == []
    assert machine.builder().build_state().kind == "prebuilt"
    assert machine.builder().load() == path


def test_prebuilt_comes_before_jit(machine):
    path = machine.prebuild("8.0;9.0a")
    calls = len(machine.nvcc.calls())
    assert machine.builder().load() == path
    assert len(machine.nvcc.calls()) == calls


def test_stale_prebuilt_is_not_used(machine, caplog):
    path = machine.prebuild("9.0a")
    (machine.library.include_dir() / "tile.cuh").write_text("// a new tile\n")
    assert machine.builder().load() != path
    assert f"{path} was built from other sources than those installed now" in caplog.text


def test_prebuilt_for_another_gpu_is_not_used(machine, caplog):
    path = machine.prebuild("8.0")
    assert machine.builder().load() != path
    assert f"{path} was built for 8.0, not for compute capability 9.0" in caplog.text


def test_prebuilt_for_a_newer_driver_is_not_used(machine, caplog):
    path = machine.prebuild("9.0a")
    unfit = f"{path} was built with CUDA 12.9, the NVIDIA driver runs CUDA up to 11.8"
    machine.set_driver((12, 2))  # a driver runs what a newer compiler of its major version made
    assert machine.builder().build_state().kind == "prebuilt"
    machine.set_driver((11, 8))
    assert machine.builder().fitting_prebuilt([H100.capability]) == (None, unfit)
    machine.monkeypatch.setenv("CUDA_HOME", str(FakeNvcc(machine.tmp_path / "cuda11", release="11.8").home))
    assert machine.builder().load() not in (path, None)
    assert f"not using the prebuilt library: {unfit}" in caplog.text
    machine.remove("nvcc")
    assert machine.builder().missing()[0] == f"the prebuilt library does not fit: {unfit}"
    assert not machine.builder().is_compatible()


def test_no_driver_is_asked_for_a_prebuilt_library_that_serves_no_gpu(machine):
    """As in the hook that runs at every `import deepspeed`."""
    path = machine.prebuild("9.0a")
    machine.monkeypatch.setattr(builder_module, "query_driver", lambda: pytest.fail("the driver was asked"))
    assert machine.builder().fitting_prebuilt(capabilities=()) == (path, "")


def test_other_file_in_place_of_the_prebuilt_is_not_used(machine, caplog):
    path = machine.prebuild("9.0a")
    path.write_bytes(b"\x7fELF")
    assert machine.builder().load() != path
    assert f"{path} is not a library of this package" in caplog.text


def test_gpus_that_the_op_cannot_use_do_not_count(machine):
    path = machine.prebuild("9.0a")
    machine.set_gpus(H100, V100)
    assert machine.builder().load() == path
    assert machine.builder().missing() == []


def test_jit_state_and_cache(machine, caplog):
    caplog.set_level(logging.INFO)
    builder = machine.builder()
    state = builder.build_state()
    assert state.kind == "would compile"
    assert builder.load() == state.path
    assert "compiling ds4sci_evoformer_attn for 9.0a, once" in caplog.text
    assert builder.build_state().kind == "cached"
    compiled = machine.nvcc.compiled()
    caplog.clear()
    assert machine.builder().load() == state.path
    assert machine.nvcc.compiled() == compiled
    assert "compiling" not in caplog.text


def test_library_is_opened_once_per_process(machine):
    builder = machine.builder()
    opened = []
    machine.monkeypatch.setattr(type(builder), "bind", lambda self, path: opened.append(path) or object())
    assert builder.load() is type(builder)().load()
    assert len(opened) == 1


def test_jit_for_all_visible_gpus(machine):
    machine.set_gpus(H100, A100)
    machine.builder().load()
    (api,) = [line for line in machine.nvcc.calls() if "api.cu" in line]
    assert "code=sm_80" in api
    assert "code=sm_90a" in api


def test_load_works_without_a_gpu(machine):
    """A machine without a GPU can still compile and open the library, if it is told for what."""
    machine.set_torch(None)
    machine.set_gpus()
    machine.monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert machine.builder().load().is_file()


def test_load_says_why_it_cannot(machine):
    machine.remove("nvcc")
    with pytest.raises(BuildError, match="cannot compile ds4sci_evoformer_attn: nvcc was not found in CUDA_HOME"):
        machine.builder().load()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DS4SCI_CACHE_DIR": "/a", "TORCH_EXTENSIONS_DIR": "/b"}, "/a/x"),
        ({"TORCH_EXTENSIONS_DIR": "/b", "XDG_CACHE_HOME": "/c"}, "/b/x"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/torch_extensions/x"),
        ({"HOME": "/home/user"}, "/home/user/.cache/torch_extensions/x"),
    ],
)
def test_cache_root(monkeypatch, variables, expected):
    for name in ("DS4SCI_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_root("x")) == expected

# SPDX-License-Identifier: Apache-2.0
"""Which architectures get compiled, and what their code runs on."""

import ctypes
import logging
import subprocess

import pytest

from deepspeed_ds4sci.op_builder import nvcc as nvcc_module
from deepspeed_ds4sci.op_builder.gpus import Gpu, query_driver, select_visible, visible_gpus
from deepspeed_ds4sci.op_builder.nvcc import find_nvcc
from deepspeed_ds4sci.op_builder.targets import ALL_TARGETS, Target, parse_targets, requested_targets


def names(text):
    return [str(target) for target in parse_targets(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0;9.0a+PTX 10.0", ["8.0", "9.0a+PTX", "10.0"]),
        ("12.0 8.6, 8.0", ["8.0", "8.6", "12.0"]),
        (" 9.0 ", ["9.0a"]),
        ("8.0;8.0+PTX;8.0", ["8.0+PTX"]),
        ("10.0f", ["10.0f"]),
        ("7.5 8.0", ["8.0"]),
        (ALL_TARGETS, ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"]),
    ],
)
def test_parse(text, expected):
    assert names(text) == expected


@pytest.mark.parametrize(("entry", "text"), [("Ampere", "8.0;Ampere"), ("9", "9"), ("9.0b", "9.0b"), ("8.0+", "8.0+")])
def test_parse_names_the_bad_entry(entry, text):
    with pytest.raises(ValueError, match="must list architectures such as 8.0 or 9.0a") as caught:
        parse_targets(text)
    assert repr(entry) in str(caught.value)


@pytest.mark.parametrize("text", ["7.0;7.5", "", " ; "])
def test_parse_needs_a_supported_architecture(text):
    with pytest.raises(ValueError, match="must name an architecture from 8.0 on, got"):
        parse_targets(text)


def test_left_out_architectures_are_logged(caplog):
    caplog.set_level(logging.INFO)
    parse_targets("7.0 7.5 8.0")
    assert "leaving out 7.0, 7.5, older than 8.0" in caplog.text


def test_gencode_flags():
    assert Target(9, 0, "a").gencode_flags() == ["-gencode=arch=compute_90a,code=sm_90a"]
    # PTX of compute_90a would run on no other GPU.
    assert Target(9, 0, "a", ptx=True).gencode_flags()[1] == "-gencode=arch=compute_90,code=compute_90"


@pytest.mark.parametrize(
    ("target", "capability", "expected"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("9.0a", (9, 0), True),
        ("10.0", (10, 3), True),
        ("10.0a", (10, 3), False),
        ("9.0a+PTX", (12, 0), True),
    ],
)
def test_runs_on(target, capability, expected):
    assert parse_targets(target)[0].runs_on(capability) is expected


def test_requested_targets_prefer_the_variable(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert requested_targets([(9, 0)]) == [Target(8, 6)]


@pytest.mark.parametrize("value", [None, "", "  "])
def test_requested_targets_from_gpus(monkeypatch, value):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    found = requested_targets([(9, 0), (8, 0), (9, 0), (7, 5)])
    assert [str(target) for target in found] == ["8.0", "9.0a"]


def test_requested_targets_without_any(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    with pytest.raises(ValueError, match="no architecture to compile for: TORCH_CUDA_ARCH_LIST is not set"):
        requested_targets([])


A100, H100, H100B = (
    Gpu("A100", "GPU-aaaa1111", (8, 0)),
    Gpu("H100", "GPU-bbbb1111", (9, 0)),
    Gpu("H100", "GPU-bbbb2222", (9, 0)),
)


@pytest.mark.parametrize(
    ("value", "pci_order", "expected"),
    [
        (None, False, [A100, H100, H100B]),
        ("", False, []),
        ("-1", False, []),
        ("NoDevFiles", False, []),
        ("1", True, [H100]),
        ("1", False, [A100, H100, H100B]),  # which GPU is number 1 is not known: all of them
        ("2,7,0", True, [H100B]),  # CUDA stops at the first invalid number
        ("GPU-bbbb2", False, [H100B]),
        ("GPU-bbbb2222,GPU-aaaa", False, [H100B, A100]),
        ("MIG-1234", False, [A100, H100, H100B]),
    ],
)
def test_visible_gpus_of_a_mixed_machine(value, pci_order, expected):
    assert select_visible([A100, H100, H100B], value, pci_order) == expected


def test_visible_gpus_of_a_uniform_machine():
    assert select_visible([H100, H100B], "1", pci_order=False) == [H100B]


def test_no_driver_means_no_gpus(monkeypatch):
    def no_library(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("deepspeed_ds4sci.op_builder.gpus.ctypes.CDLL", no_library)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    assert query_driver() is None
    assert visible_gpus() == []


# The part of NVML that is asked, for a machine with three GPUs of which the second may not be used.
_NVML = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int* version) { *version = 12080; return STATUS; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** device) { *device = (void*)(i + 1ul); return i == 1 ? 4 : 0; }
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
    *major = device == (void*)1 ? 9 : 12;
    *minor = 0;
    return 0;
}
int nvmlDeviceGetName(void* device, char* name, unsigned size) { strncpy(name, "NVIDIA H100", size); return 0; }
int nvmlDeviceGetUUID(void* device, char* uuid, unsigned size) { return 3; }
"""


def load_nvml(folder, monkeypatch, status):
    """Puts a library made from the above in place of NVML; `status` is what its version call returns."""
    (folder / "nvml.c").write_text(_NVML)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", f"-DSTATUS={status}", str(folder / "nvml.c"), "-o", str(library)], check=True
    )
    original = ctypes.CDLL
    monkeypatch.setattr("deepspeed_ds4sci.op_builder.gpus.ctypes.CDLL", lambda name: original(str(library)))
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)


def test_driver_is_asked(monkeypatch, tmp_path):
    load_nvml(tmp_path, monkeypatch, status=0)
    driver = query_driver()
    assert driver.cuda_version == (12, 8)
    assert driver.gpus == (Gpu("NVIDIA H100", "", (9, 0)), Gpu("NVIDIA H100", "", (12, 0)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert [gpu.capability for gpu in visible_gpus()] == [(12, 0)]


def test_driver_that_does_not_answer(monkeypatch, tmp_path):
    load_nvml(tmp_path, monkeypatch, status=999)
    assert query_driver() is None
    assert visible_gpus() == []


@pytest.mark.gpu
def test_driver_agrees_with_torch():
    import torch

    driver = query_driver()
    assert torch.cuda.get_device_capability() in {gpu.capability for gpu in driver.gpus}
    assert driver.cuda_version >= tuple(int(part) for part in torch.version.cuda.split(".")[:1])


def write_nvcc(folder, release):
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\necho "release {release}, V{release}.1"\necho compute_80 compute_90\n')
    path.chmod(0o755)
    return path


def test_find_nvcc_order(monkeypatch, tmp_path):
    paths = {name: write_nvcc(tmp_path / name, release) for name, release in (("home", "12.1"), ("path", "12.2"))}
    paths["PATH"] = write_nvcc(tmp_path / "search", "12.3")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("PATH", str(tmp_path / "search" / "bin"), prepend=":")
    for path in paths.values():
        assert find_nvcc().path == str(path)
        path.unlink()


def test_broken_nvcc_is_passed_over(monkeypatch, tmp_path):
    broken = write_nvcc(tmp_path / "broken", "x")
    broken.write_text("#!/bin/sh\nexit 1\n")
    good = write_nvcc(tmp_path / "good", "12.9")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "broken"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "good"))
    assert find_nvcc().path == str(good)


def test_nvcc_says_which_targets_it_lacks(monkeypatch, tmp_path):
    write_nvcc(tmp_path / "home", "12.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    found = find_nvcc()
    assert found.unsupported(parse_targets("8.0;9.0a;10.0")) == [Target(10, 0)]


def test_no_nvcc(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvcc_module.os, "access", lambda path, mode: False)
    assert find_nvcc() is None

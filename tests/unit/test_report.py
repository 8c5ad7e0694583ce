# SPDX-License-Identifier: Apache-2.0
"""python -m deepspeed_ds4sci.report: what it prints, on this machine and on others made up here."""

import re

import pytest
import torch

from deepspeed_ds4sci import _version, report
from deepspeed_ds4sci.op_builder.builder import BuildState
from deepspeed_ds4sci.op_builder.gpus import Driver, Gpu
from deepspeed_ds4sci.op_builder.nvcc import Nvcc
from deepspeed_ds4sci.ops._dispatch import explain
from tests.helpers.processes import run_python

H100 = Gpu("NVIDIA H100", "GPU-1", (9, 0))
A100 = Gpu("NVIDIA A100", "GPU-2", (8, 0))
NVCC = Nvcc("/opt/cuda/bin/nvcc", (12, 9), "release 12.9", frozenset({"80", "90"}))


class Builder:
    """Stands for EvoformerAttnBuilder."""

    def __init__(self, state, missing=()):
        self.state, self.reasons = state, list(missing)

    def build_state(self):
        return self.state

    def missing(self):
        return self.reasons


def test_whole_report():
    output = run_python(
        "import runpy; runpy.run_module('deepspeed_ds4sci.report', run_name='__main__')", CUDA_VISIBLE_DEVICES=""
    )
    assert f"deepspeed_ds4sci ..... {_version.__version__}" in output
    assert "hooks into DeepSpeed . on" in output
    assert re.search(r"^compiled library \.+ (prebuilt|cached|would compile|cannot)", output, re.M)
    assert "no CUDA GPU is visible" in output
    assert re.search(r"^cpu float32 \.+ tiled$", output, re.M)
    assert "  - not sm90: " in output


def test_versions():
    text = "\n".join(report.version_lines())
    assert torch.__version__ in text
    assert "(supported: >=0.19.8,<0.20)" in text


def test_missing_deepspeed_is_said(monkeypatch):
    def not_found(name):
        raise report.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(report.importlib.metadata, "version", not_found)
    assert "not installed (supported" in "\n".join(report.version_lines())


@pytest.mark.parametrize(
    ("variables", "enabled", "expected"),
    [
        ({"DS4SCI_DISABLE": "1"}, False, "off: DS4SCI_DISABLE is set"),
        ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, True, "on after `import deepspeed_ds4sci`"),
        ({}, True, "on"),
        ({}, False, "off: see the warning in the log"),
    ],
)
def test_hooks(monkeypatch, variables, enabled, expected):
    for name in ("DS4SCI_DISABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(report.plugin, "enabled", lambda: enabled)
    assert f" {expected}" in report.hook_line()


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (BuildState("prebuilt", "/package/library.so"), "prebuilt: /package/library.so"),
        (BuildState("cached", "/cache/library.so"), "cached: /cache/library.so"),
        (BuildState("would compile", "/cache/library.so"), "would compile"),
        (BuildState("cannot", reasons=("nvcc was not found",)), "cannot"),
    ],
)
def test_build_state(state, expected):
    lines = report.build_lines(Builder(state, ["nvcc was not found"]), [H100], NVCC, Driver((13, 0), (H100,)))
    assert "GPU 0 ................ NVIDIA H100, capability 9.0" in lines
    assert "NVIDIA driver ........ runs CUDA up to 13.0" in lines
    assert "nvcc ................. /opt/cuda/bin/nvcc (CUDA 12.9)" in lines
    assert f"compiled library ..... {expected}" in lines
    assert lines[-1] == "  - nvcc was not found"


def test_machine_without_anything():
    lines = report.build_lines(Builder(BuildState("cannot")), [], None, None)
    assert lines == [
        "GPU .................. none visible",
        "nvcc ................. not found",
        "compiled library ..... cannot",
    ]


def test_implementations_with_reasons():
    def fake_explain(problem):
        return [("sm90", "not built"), ("sm80", None), ("tiled", None), ("reference", None)]

    assert report.implementation_lines([("cuda 9.0 bfloat16", None)], fake_explain) == [
        "cuda 9.0 bfloat16 .... sm80",
        "  - not sm90: not built",
    ]


def test_nothing_can_run():
    lines = report.implementation_lines([("x", None)], lambda problem: [("tiled", "no"), ("reference", None)])
    assert lines == ["x .................... none", "  - not tiled: no"]


def test_problems_of_a_gpu_machine():
    problems = report.problems_here([A100, H100, H100])
    assert [text for text, _ in problems] == [
        "cuda 8.0 bfloat16",
        "cuda 8.0 float16",
        "cuda 8.0 float32",
        "cuda 9.0 bfloat16",
        "cuda 9.0 float16",
        "cuda 9.0 float32",
    ]
    assert all(explain(problem) for _, problem in problems)
    assert [text for text, _ in report.problems_here([])] == ["cpu bfloat16", "cpu float32", "cpu float64"]

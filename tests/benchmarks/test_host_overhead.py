# SPDX-License-Identifier: Apache-2.0
"""The measurement of host time, on the library without kernels."""

import json
import shutil

import pytest
import torch

from deepspeed_ds4sci.ops import _dispatch
from tests.benchmarks import host_overhead

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the stub with")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_layers_lie_inside_one_another(tmp_path, capsys):
    host_overhead.main(["--bursts", "3", "--json", str(tmp_path / "host.json")])
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert {row["where"] for row in rows} == {"CPU, stub"}
    of_op = {row["what"]: row for row in rows if row["extension"] is not None}
    assert list(of_op) == [
        f"evoformer_attention, {passes}" for passes in ("forward", "forward, recorded", "forward + backward")
    ]
    for row in of_op.values():
        assert 0 < row["library"] < row["extension"]
    both = of_op["evoformer_attention, forward + backward"]
    assert both["extension"] < both["total"]
    assert "us" in capsys.readouterr().out.splitlines()[0]


def test_the_stub_is_gone_afterwards():
    host_overhead.measure(bursts=1)
    problem = _dispatch.Problem("cpu", None, torch.bfloat16, 1, 2, 16, 16, 2, 16)
    assert _dispatch.choose(problem).name == "tiled"


def test_a_machine_without_compiler_and_gpu_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(host_overhead.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        host_overhead.main([])
    assert "no g++ to compile the stub with, and no CUDA GPU" in capsys.readouterr().err


def test_no_bursts_are_refused(capsys):
    with pytest.raises(SystemExit):
        host_overhead.main(["--bursts", "0"])
    assert "--bursts must be at least 1, got 0" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""The two-GPU evidence without GPUs: its report, and one part of it on CPU ranks."""

import json

import pytest

from tests.benchmarks.two_gpus.__main__ import main
from tests.benchmarks.two_gpus.parts import PARTS
from tests.benchmarks.two_gpus.report import draw, succeeded, text


def test_one_part_on_cpu_ranks_writes_its_record(tmp_path, capsys):
    record = tmp_path / "record.json"
    assert main(["--tiny", "--parts", "table", "--json", str(record)]) == 0
    found = json.loads(record.read_text())["parts"]["table"]
    for name in ("weight", "gradient", "optimizer_state"):
        assert found["rank 0 of two"][name] * 2 == found["rank 1 of two"][name] * 2 == found["one rank"][name] > 0
    assert "rank 1 of two" in capsys.readouterr().out
    assert main(["--redraw", str(record), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_part_that_fails_is_recorded_and_told(tmp_path, monkeypatch, capsys):
    def fail(ranks, sizes):
        raise RuntimeError("the second GPU is gone")

    monkeypatch.setitem(PARTS, "masks", fail)
    assert main(["--tiny", "--parts", "masks", "--json", str(tmp_path / "record.json")]) == 1
    assert "the second GPU is gone" in capsys.readouterr().out


def test_parts_of_which_some_runs_failed_are_shown_and_no_success(tmp_path):
    record = {
        "machine": {"device": "x", "cuda": "-", "torch": "x", "commit": "x", "date": "x", "command": "x"},
        "seconds": {"curves": 1.0, "longest": 1.0, "equality": 1.0},
        "parts": {
            "equality": {"limit": 2e-6, "rows": [{"case": "a", "loss": 1, "gradient": 0, "step": 0, "holds": False}]},
            "curves": {
                "model": "m",
                "steps": 2,
                "base": "one",
                "runs": {"two": {"losses": [2.0, 1.0], "step_seconds": 0.1, "peak_bytes": 2**20}},
                "distances": {},
                "failed": {"one": "Traceback\nout of luck"},
            },
            "longest": {"model": "m", "runs": {}, "ratio": None, "failed": {"one": "no", "two": "no"}},
        },
    }
    shown = text(record)
    assert "out of luck" in shown and "EXCEEDED" in shown and not succeeded(record)
    draw(record, tmp_path / "plot.png")


def test_needs_two_gpus_or_the_word_tiny(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit):
        main(["--parts", "table"])
    assert "needs two GPUs, torch sees 1" in capsys.readouterr().err

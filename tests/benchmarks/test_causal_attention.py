# SPDX-License-Identifier: Apache-2.0
"""The comparison of causal attention implementations, on short sequences and the CPU."""

import json

import pytest
import torch

from tests.benchmarks import causal_attention
from tests.benchmarks.causal_attention import causal_flops, main


def test_it_times_what_runs_here_and_says_why_the_rest_does_not(tmp_path, capsys):
    record = tmp_path / "deep" / "record.json"
    arguments = ["--lengths", "64", "--head-dims", "8,12", "--width", "24", "--min-ms", "1", "--json", str(record)]
    assert main([*arguments, "--implementations", "auto,flash,cudnn"]) == 0
    rows = json.loads(record.read_text())["rows"]
    assert [(row["head_dim"], row["heads"], row["implementation"]) for row in rows] == [
        (dim, 24 // dim, name) for dim in (8, 12) for name in ("auto", "flash", "cudnn")
    ]
    for row in rows:
        if row["implementation"] == "cudnn" and not torch.cuda.is_available():
            assert "needs a CUDA GPU" in row["failed"]
        elif "failed" not in row:
            both = row["forward+backward"]
            assert both["first_seconds"] > 0
            assert both["tflops"] * both["ms"] == pytest.approx(3.5 * 2 * 64**2 * 24 / 1e9)
    assert sum("failed" in row for row in rows) <= 2
    assert "64   3 x 8    auto" in capsys.readouterr().out


def test_what_is_compiled_comes_last(monkeypatch, tmp_path):
    """A run that is cut off while it compiles has the rest, at all lengths, in its record."""
    record, tried = tmp_path / "record.json", []

    def measure(case, *_):
        if case["implementation"] == "flex":
            raise KeyboardInterrupt
        tried.append((case["seq_len"], case["implementation"]))
        return {"failed": "not tried"}

    monkeypatch.setattr(causal_attention, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        main(
            ["--lengths", "64,128", "--head-dims", "8", "--implementations", "flex,auto,flash", "--json", str(record)]
        )
    assert tried == [(length, name) for length in (64, 128) for name in ("auto", "flash")]
    assert len(json.loads(record.read_text())["rows"]) == len(tried)


def test_operations_are_those_of_the_triangle():
    assert causal_flops(100, 2, 3) == {"forward": 4 * 100**2 / 2 * 6, "forward+backward": 3.5 * 4 * 100**2 / 2 * 6}


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--implementations", "flush"])
    assert "got flush" in capsys.readouterr().err


def test_the_table_of_a_record():
    shape = dict(seq_len=16384, heads=32, head_dim=120)
    timed = {"forward": {"ms": 3.54, "tflops": 583.0}, "forward+backward": {"ms": 12.69, "tflops": 568.7}}
    rows = [
        {**shape, "implementation": "cudnn", **timed},
        {**shape, "implementation": "flash_attn_4", "failed": "not here"},
    ]
    about = dict(device="card", cuda="-", driver="-", torch="2", commit="abc", date="2026-01-01", command="c")
    lines = causal_attention.markdown_attention({"machine": about, "rows": rows}).splitlines()
    assert lines[0].endswith("| `cudnn` | `flash_attn_4` |") and len(lines) == 5
    assert lines[2] == "| 16,384, 32 x 120 | 3.54 / 12.7, 569 | - |"

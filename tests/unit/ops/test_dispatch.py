# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, decided without a GPU from sizes alone."""

import logging

import pytest
import torch

from deepspeed_ds4sci.ops import _dispatch
from deepspeed_ds4sci.ops._dispatch import Problem, Unavailable, choose, explain, implementations, problem_of

CPU = Problem("cpu", None, torch.float32, 1, 4, 16, 16, 2, 8)
H100 = Problem("cuda", (9, 0), torch.bfloat16, 1, 512, 512, 512, 4, 32)


class Fake:
    """Runs what `refuses` does not name."""

    def __init__(self, name, refuses=()):
        self.name = name
        self.refuses = refuses

    def unsupported_reason(self, problem):
        return f"no {problem.device_type}" if problem.device_type in self.refuses else None


@pytest.fixture
def table(monkeypatch):
    """Put rows in place of the real table; nothing chosen or announced before counts."""

    def install(*rows):
        monkeypatch.setattr(_dispatch, "implementations", lambda: rows)
        choose.cache_clear()
        monkeypatch.setattr(_dispatch, "_announced", set())

    yield install
    choose.cache_clear()


def test_the_table_is_fastest_first_and_ends_with_the_reference():
    assert [entry.name for entry in implementations()] == ["sm90", "sm80", "tiled", "reference"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_cpu_gets_tiled_in_every_dtype(dtype):
    assert choose(Problem("cpu", None, dtype, 2, 3, 1, 700, 1, 128)).name == "tiled"


def test_a_device_without_kernels_gets_tiled():
    assert choose(Problem("mps", None, torch.float32, 1, 1, 8, 8, 1, 8)).name == "tiled"


def test_an_old_gpu_and_fp64_get_tiled_on_cuda():
    old = Problem("cuda", (7, 0), torch.float16, 1, 1, 8, 8, 1, 8)
    assert choose(old).name == choose(Problem("cuda", (9, 0), torch.float64, 1, 1, 8, 8, 1, 8)).name == "tiled"


def test_the_fastest_that_can_run_is_chosen(table):
    table(Fake("first", refuses=("cpu",)), Fake("second"), Fake("third"), Fake("reference"))
    assert choose(CPU).name == "second"
    assert choose(H100).name == "first"


def test_the_last_row_is_never_chosen_unless_named(table):
    table(Fake("first", refuses=("cpu",)), Fake("reference"))
    with pytest.raises(NotImplementedError, match="no implementation can run this problem: first: no cpu"):
        choose(CPU)
    assert choose(CPU, "reference").name == "reference"


def test_a_name_is_honoured_or_refused_with_the_reason(table):
    table(Fake("first", refuses=("cpu",)), Fake("second"), Fake("reference"))
    assert choose(H100, "second").name == "second"
    with pytest.raises(NotImplementedError, match='implementation "first" cannot run this problem: no cpu'):
        choose(CPU, "first")


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    message = "implementation must be None or one of sm90, sm80, tiled, reference, got 'triton'"
    with pytest.raises(ValueError, match=message):
        choose(CPU, "triton")


def test_a_row_that_cannot_run_says_why_when_run():
    row = Unavailable("sm90", "not written yet")
    assert row.unsupported_reason(CPU) == "not written yet"
    for run in (row.forward, row.backward):
        with pytest.raises(NotImplementedError, match='implementation "sm90" cannot run: not written yet'):
            run()


def test_explain_gives_a_reason_for_every_row_that_cannot_run():
    reasons = dict(explain(CPU))
    assert list(reasons) == ["sm90", "sm80", "tiled", "reference"]
    assert reasons["tiled"] is reasons["reference"] is None
    assert "Hopper path" in reasons["sm90"]
    assert "cpu" in reasons["sm80"]


def test_a_module_that_does_not_import_becomes_the_reason(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed_ds4sci.ops.sm80", None)
    row = _dispatch._portable_cuda()
    assert row.name == "sm80"
    assert row.unsupported_reason(H100).startswith("its Python module does not import: ")


def test_one_log_line_per_device_and_reason(table, caplog):
    table(Fake("fast", refuses=("cpu",)), Fake("slow"), Fake("reference"))
    with caplog.at_level(logging.INFO, logger="deepspeed_ds4sci"):
        for rows in range(3):
            choose(Problem("cpu", None, torch.float32, 1, rows, 16, 16, 2, 8))
        choose(H100)
        choose(H100, "slow")
    assert [record.getMessage() for record in caplog.records] == [
        'evoformer_attention on cpu runs "slow"; not fast: no cpu',
        'evoformer_attention on cuda with compute capability 9.0 runs "fast"',
    ]
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_choices_are_kept_until_forgotten(monkeypatch):
    assert choose(CPU) is choose(CPU)
    monkeypatch.setattr(_dispatch, "_portable_cuda", lambda: Fake("sm80"))
    assert choose(CPU).name == "tiled"
    _dispatch.forget_choices()
    assert choose(CPU).name == "sm80"
    monkeypatch.undo()
    _dispatch.forget_choices()
    assert choose(CPU).name == "tiled"


def test_a_problem_is_read_off_the_tensors():
    q, k = torch.empty(2, 3, 5, 4, 8, dtype=torch.bfloat16), torch.empty(2, 3, 7, 4, 8, dtype=torch.bfloat16)
    assert problem_of(q, k) == Problem("cpu", None, torch.bfloat16, 2, 3, 5, 7, 4, 8)

# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, decided without a GPU from sizes alone."""

import logging

import pytest
import torch

from deepspeed_ds4sci.ops import _dispatch, _extension, sm80, sm90
from deepspeed_ds4sci.ops._dispatch import (
    SM90_MIN_QUERIES,
    SM90_MIN_ROWS,
    Missing,
    Problem,
    Unavailable,
    choose,
    explain,
    implementations,
    problem_of,
)
from tests.helpers.processes import run_python

CPU = Problem("cpu", None, torch.float32, 1, 4, 16, 16, 2, 8)
H100 = Problem("cuda", (9, 0), torch.bfloat16, 1, 512, 512, 512, 4, 32, torch.bfloat16, 1, 32**-0.5)
COMPILED = (sm80, sm90)


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
    assert "cpu" in reasons["sm90"] and "cpu" in reasons["sm80"]


@pytest.mark.parametrize("name", ["sm80", "sm90"])
def test_a_module_that_does_not_import_becomes_the_reason(monkeypatch, name):
    monkeypatch.setitem(__import__("sys").modules, f"deepspeed_ds4sci.ops.{name}", None)
    row = _dispatch._of_module(name)
    assert row.name == name
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
    monkeypatch.setattr(_dispatch, "_of_module", lambda name: Fake(name, () if name == "sm80" else ("cpu",)))
    assert choose(CPU).name == "tiled"
    _dispatch.forget_choices()
    assert choose(CPU).name == "sm80"
    monkeypatch.undo()
    _dispatch.forget_choices()
    assert choose(CPU).name == "tiled"


def test_a_problem_is_read_off_the_tensors():
    q, k = torch.empty(2, 3, 5, 4, 8, dtype=torch.bfloat16), torch.empty(2, 3, 7, 4, 8, dtype=torch.bfloat16)
    sizes = ("cpu", None, torch.bfloat16, 2, 3, 5, 7, 4, 8)
    assert problem_of(q, k, None, 0.5) == Problem(*sizes, None, 1, 0.5)
    for batch in (1, 2):
        assert problem_of(q, k, torch.empty(batch, 1, 4, 5, 7), -0.5) == Problem(*sizes, torch.float32, batch, -0.5)


def test_rows_that_share_a_pair_bias():
    assert H100._replace(batch=3, rows=5).rows_sharing_bias == 15
    assert H100._replace(batch=3, rows=5, pair_batch=3).rows_sharing_bias == 5
    assert H100._replace(batch=3, rows=5, pair_dtype=None).rows_sharing_bias == 15


@pytest.fixture
def compiled(monkeypatch):
    """The compiled library is there, with the kernels of every path but those given."""

    def install(*missing):
        for module in COMPILED:
            monkeypatch.setattr(module, "missing_reason", lambda path: "not compiled" if path in missing else None)
        choose.cache_clear()
        monkeypatch.setattr(_dispatch, "_announced", set())

    yield install
    choose.cache_clear()


FP32_PAIR = {"pair_dtype": torch.float32}
REFUSED_BY_SM90 = [
    ({"device_type": "cpu", "capability": None}, "needs a CUDA device, got cpu"),
    ({"capability": (8, 9)}, "needs compute capability 9.0 (Hopper), got 8.9"),
    ({"capability": (10, 0)}, "needs compute capability 9.0 (Hopper), got 10.0"),
    ({"dtype": torch.float32, **FP32_PAIR}, "takes fp16 and bf16, got torch.float32"),
    ({"head_dim": 65}, "takes head_dim up to 64, got 65"),
    (FP32_PAIR, "takes a pair bias of q's dtype torch.bfloat16, got torch.float32"),
    ({"softmax_scale": 0.0}, "takes softmax_scale from 1e-07 to 1e+20, got 0"),
    ({"softmax_scale": -0.5}, "takes softmax_scale from 1e-07 to 1e+20, got -0.5"),
    ({"softmax_scale": 1e-30}, "takes softmax_scale from 1e-07 to 1e+20, got 1e-30"),
    ({"softmax_scale": float("nan")}, "takes softmax_scale from 1e-07 to 1e+20, got nan"),
    ({"rows": 2**27, "q_len": 64, "heads": 32}, f"takes up to {2**31 - 2**16} work items, {2**35} needed"),
    ({"rows": 2**20, "q_len": 2**19, "k_len": 1, "heads": 1}, f"takes up to {2**31 - 2**16} work items, {2**31} nee"),
    ({"batch": 2**29, "rows": 1, "pair_batch": 2**29, "k_len": 1}, f"takes up to {2**31 - 2**16} work items, {2**33}"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED_BY_SM90, ids=[reason for _, reason in REFUSED_BY_SM90])
def test_sm90_refuses_by_name_and_is_passed_over_without(compiled, changes, reason):
    compiled()
    problem = H100._replace(**changes)
    assert sm90.SM90.unsupported_reason(problem).startswith(reason)
    with pytest.raises(NotImplementedError, match='implementation "sm90" cannot run this problem: '):
        choose(problem, "sm90")
    assert dict(explain(problem))["sm90"].startswith(reason)
    assert choose(problem).name in ("sm80", "tiled")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": torch.float16, "pair_dtype": torch.float16},
        {"pair_dtype": None},
        {"head_dim": 1},
        {"head_dim": 64},
        {"rows": SM90_MIN_ROWS, "q_len": SM90_MIN_QUERIES, "k_len": 1},
        {"batch": 48, "rows": 1},  # samples share the pair bias
        {"rows": 2**20, "q_len": 2**18, "k_len": 1, "heads": 1},
    ],
    ids=str,
)
def test_hopper_gets_sm90(compiled, changes):
    compiled()
    problem = H100._replace(**changes)
    assert choose(problem).name == choose(problem, "sm90").name == "sm90"
    assert dict(explain(problem))["sm90"] is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": SM90_MIN_ROWS - 1}, "slower than sm80 below 3 rows with the same pair bias"),
        ({"batch": 48, "rows": 1, "pair_batch": 48}, "slower than sm80 below 3 rows with the same pair bias"),
        ({"q_len": SM90_MIN_QUERIES - 1}, "slower than sm80 below 32 queries"),
    ],
    ids=str,
)
def test_where_sm80_is_faster_sm90_runs_only_by_name(compiled, changes, reason):
    compiled()
    problem = H100._replace(**changes)
    assert choose(problem).name == "sm80"
    assert dict(explain(problem))["sm90"] == reason
    assert choose(problem, "sm90").name == "sm90"


def test_a_library_for_other_gpus_leaves_sm80(compiled, caplog):
    compiled("sm90")
    with caplog.at_level(logging.INFO, logger="deepspeed_ds4sci"):
        assert choose(H100).name == choose(H100._replace(rows=64)).name == "sm80"
    assert [record.getMessage() for record in caplog.records] == [
        'evoformer_attention on cuda with compute capability 9.0 runs "sm80"; not sm90: not compiled'
    ]
    with pytest.raises(NotImplementedError, match="cannot run this problem: not compiled"):
        choose(H100, "sm90")


@pytest.mark.parametrize(
    ("missing", "changes", "level", "chosen"),
    [
        (("sm90", "sm80"), {}, logging.WARNING, "tiled"),
        (("sm90", "sm80"), {"rows": 1}, logging.WARNING, "tiled"),
        (("sm90",), {}, logging.WARNING, "sm80"),
        (("sm90",), {"rows": 1}, logging.INFO, "sm80"),  # sm90 would be slower
        (("sm90", "sm80"), {"head_dim": 128, "dtype": torch.float64}, logging.INFO, "tiled"),
        (("sm90", "sm80"), {"device_type": "cpu", "capability": None}, logging.INFO, "tiled"),
        ((), {"dtype": torch.float32}, logging.INFO, "sm80"),
    ],
)
def test_a_missing_library_is_a_warning_on_cuda(compiled, caplog, missing, changes, level, chosen):
    """Of one rank it would not be seen otherwise: lines below WARNING are shown for rank 0 only."""
    compiled(*missing)
    with caplog.at_level(logging.INFO, logger="deepspeed_ds4sci"):
        assert choose(H100._replace(**changes)).name == chosen
    (record,) = caplog.records
    assert record.levelno == level, record.getMessage()


def test_a_module_that_does_not_import_is_a_warning_on_cuda(table, caplog):
    table(Unavailable("fast", "not there"), Fake("slow"), Fake("reference"))
    choose(H100)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage().endswith('runs "slow"; not fast: not there')
    assert isinstance(Unavailable("fast", "not there").unsupported_reason(CPU), Missing)


def test_a_rank_that_lacks_the_library_says_so():
    output = run_python(
        """
        import torch
        from deepspeed_ds4sci.ops import _dispatch, sm80, sm90
        sm80.missing_reason = sm90.missing_reason = lambda path: "waited 1800 s for the build lock"
        sizes = (1, 256, 256, 256, 4, 32)
        assert _dispatch.choose(_dispatch.Problem("cuda", (9, 0), torch.bfloat16, *sizes)).name == "tiled"
        """,
        RANK=1,
    )
    assert output == (
        '[deepspeed_ds4sci] WARNING: evoformer_attention on cuda with compute capability 9.0 runs "tiled"; '
        "not sm90: waited 1800 s for the build lock; not sm80: waited 1800 s for the build lock\n"
    )


def test_the_choice_of_a_layer_is_logged_too():
    """`deepspeed_ds4sci.nn` reaches the op without a public name of the package and without DeepSpeed."""
    output = run_python("""
        import torch
        from deepspeed_ds4sci.nn import TriangleAttentionStartingNode
        for _ in range(2):
            TriangleAttentionStartingNode(8, 4, 2)(torch.randn(1, 4, 4, 8))
    """)
    assert output.count('[deepspeed_ds4sci] INFO: evoformer_attention on cpu runs "tiled"') == 1, output


def test_what_is_slower_is_logged_once_for_all_sizes(compiled, caplog):
    compiled()
    with caplog.at_level(logging.INFO, logger="deepspeed_ds4sci"):
        for q_len in range(1, SM90_MIN_QUERIES):
            choose(H100._replace(q_len=q_len))
    (record,) = caplog.records
    assert record.getMessage().endswith('runs "sm80"; not sm90: slower than sm80 below 32 queries')


def test_sm80_takes_what_sm90_takes(compiled):
    """Else a problem for which sm90 counts as slower would go to a path that is slower still."""
    compiled()
    for head_dim in range(1, sm90.MAX_HEAD_DIM + 1):
        for dtype in sm90.DTYPES:
            problem = H100._replace(dtype=dtype, pair_dtype=dtype, head_dim=head_dim, rows=1, softmax_scale=1e-7)
            assert sm90.SM90.unsupported_reason(problem) is sm80.SM80.unsupported_reason(problem) is None
            assert choose(problem).name == "sm80"


def test_why_the_compiled_library_is_missing(monkeypatch):
    def fail():
        raise RuntimeError("no nvcc")

    monkeypatch.setattr(_extension, "extension", fail)
    _extension.missing_reason.cache_clear()
    for module in COMPILED:
        assert module.missing_reason("sm80") == "its compiled library is not available: no nvcc"
    _extension.missing_reason.cache_clear()

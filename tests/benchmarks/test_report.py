# SPDX-License-Identifier: Apache-2.0
"""Record, terminal table, README tables, plot and command line."""

import copy
import json
import re

import pytest
import torch

from tests.benchmarks import plot, record, table, tables
from tests.benchmarks.__main__ import GROUPS, chosen_passes, chosen_peers, chosen_shapes, main
from tests.benchmarks.case import Case
from tests.benchmarks.measure import Result, Settings
from tests.benchmarks.timing import Timing
from tests.helpers.shapes import BY_NAME

ABOUT = {
    "device": "GPU X",
    "driver": "1",
    "cuda": "13.0",
    "torch": "2.11",
    "python": "3.12",
    "commit": "abc",
    "date": "2026-01-02",
    "command": "python -m tests.benchmarks --graph",
}


def result(shape: str, name: str, which: str, ms: float | None, **changes) -> Result:
    made = Result(Case.of(BY_NAME[shape], "bf16", "random", True), name, which, **changes)
    if ms is not None:
        made.timing, made.tflops = Timing(ms, 0.9 * ms, 1.1 * ms, 10), 100.0
        made.extra_mib = 8.0 if made.mode == "eager" else None
    return made


@pytest.fixture
def made() -> dict:
    results = [
        result("triangle-256", "ours[sm80]", "fwd", 0.08),
        result("triangle-256", "ours[sm80]", "fwd", 0.05, mode="graph"),
        result("triangle-256", "ours[sm80]", "fwd+bwd", 0.36),
        result("triangle-256", "flex", "fwd", 0.067),
        result("triangle-256", "flex", "fwd+bwd", 0.511),
        result("triangle-256", "cueq", "fwd", None, status="missing", reason="pip install it"),
        result("triangle-256", "cueq", "fwd+bwd", None, status="missing", reason="pip install it"),
        result("triangle-1024", "ours[sm80]", "fwd", 3.0),
        result("triangle-1024", "ours[sm80]", "fwd+bwd", 13.0),
        result("triangle-1024", "flex", "fwd", 3.04),
        result("triangle-1024", "flex", "fwd+bwd", None, status="OOM", reason="full"),
    ]
    return record.as_record(ABOUT, Settings(), ["ours[sm80]"], results)


def test_record_comes_back_as_it_was(made, tmp_path):
    path = tmp_path / "new" / "r.json"
    record.write(path, made)
    assert record.read(path) == json.loads(json.dumps(made))
    assert len(json.loads(path.read_text())["cases"]) == 2


def test_record_of_another_format_is_refused(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"format": 0}')
    with pytest.raises(ValueError, match="must be a record of format 1, got 0"):
        record.read(path)


def test_machine_line():
    line = record.machine_line(ABOUT)
    assert line == "GPU X | driver 1 | CUDA 13.0 | torch 2.11 | commit abc | 2026-01-02"
    about = record.machine(torch.device("cpu"), ["--quick"])
    assert about["command"].endswith("--quick") and "threads" in about["device"]
    assert "driver" not in record.machine_line(about)


def test_commit_can_be_named(monkeypatch):
    monkeypatch.setenv("DS4SCI_COMMIT", "1234567")
    assert record.commit() == "1234567"


def test_table_holds_times_ratios_and_what_is_missing(made):
    lines = table.render(made).splitlines()
    assert lines[0].split()[:5] == ["shape", "dtype", "pass", "ours[sm80]", "ms"]
    rows = [re.split(r"\s{2,}", line) for line in lines[2:]]
    assert rows == [
        ["triangle-256", "bf16", "fwd", "0.080", "0.067 (0.84x)", "missing", "100", "10%"],
        ["triangle-256", "bf16", "fwd graph", "0.050", "-", "-", "100", "10%"],
        ["triangle-256", "bf16", "fwd+bwd", "0.360", "0.511 (1.42x)", "missing", "100", "10%"],
        ["triangle-1024", "bf16", "fwd", "3.00", "3.04 (1.01x)", "-", "100", "10%"],
        ["triangle-1024", "bf16", "fwd+bwd", "13.0", "OOM", "-", "100", "10%"],
    ]


def test_no_ratio_to_what_was_not_timed(made):
    made["results"][0].update(status="WRONG", timing=None)
    row = table.render(made).splitlines()[2]
    assert "WRONG" in row and "0.067 " in row and "x)" not in row


def test_memory_table(made):
    rows = [re.split(r"\s{2,}", line) for line in table.render_memory(made).splitlines()[2:]]
    assert rows[0] == ["triangle-256", "bf16", "fwd", "8", "8", "missing"]
    assert rows[-1] == ["triangle-1024", "bf16", "fwd+bwd", "8", "OOM", "-"]
    for entry in made["results"]:
        entry["extra_mib"] = None
    assert table.render_memory(made) is None


def test_reasons_name_implementation_place_and_cause(made):
    assert table.reasons(made) == [
        "cueq: missing, everywhere: pip install it",
        "flex: OOM, triangle-1024 fwd+bwd: full",
    ]


def test_milliseconds_have_three_digits():
    assert [table.milliseconds(x) for x in (0.0456, 1.234, 12.34, 123.4)] == ["0.046", "1.23", "12.3", "123"]


def test_markdown_joins_the_passes(made):
    lines = tables.markdown(made, tables.options_of("")).splitlines()
    assert lines[0] == "| shape (N x L, H, D; fwd / fwd+bwd, ms) | ours[sm80] | flex |"
    assert lines[2] == "| triangle-256 (256 x 256, 4, 32), bf16 | 0.080 / 0.360 | 0.067 / 0.511 |"
    assert lines[3] == "| triangle-256 (256 x 256, 4, 32), bf16, CUDA graph | 0.050 / - | - |"
    assert lines[4] == "| triangle-1024 (1024 x 1024, 4, 32), bf16 | 3.00 / 13.0 | 3.04 / OOM |"
    assert lines[-1].endswith("| 2026-01-02 | `python -m tests.benchmarks --graph`")


def test_markdown_of_memory_and_of_chosen_columns(made):
    options = tables.options_of("show=memory columns=flex,cueq shapes=triangle-256")
    lines = tables.markdown(made, options).splitlines()
    assert lines[0] == "| shape (N x L, H, D; extra MiB) | flex | cueq |"
    assert lines[2:4] == ["| triangle-256 (256 x 256, 4, 32), bf16 | 8 | missing |", ""]


@pytest.mark.parametrize(("text", "message"), [("size=3", "options are show"), ("show=speed", "time or memory")])
def test_markers_with_unknown_options_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        tables.options_of(text)


def test_tables_are_replaced_between_their_markers(made, tmp_path):
    record.write(tmp_path / "h100.json", made)
    text = "before\n<!-- bench:h100 shapes=triangle-1024 -->\nold\n<!-- /bench:h100 -->\nafter\n"
    new = tables.updated(text, tmp_path)
    assert "old" not in new and new.startswith("before\n<!-- bench:h100 shapes=") and new.endswith("-->\nafter\n")
    assert "triangle-1024" in new and "triangle-256" not in new
    assert tables.updated(new, tmp_path) == new


def test_tables_of_the_readmes_are_those_of_the_records():
    for path in tables.FILES:
        text = path.read_text()
        assert tables.BLOCK.search(text) or tables.LENGTHS.search(text), f"{path} has no table of measured figures"
        assert tables.updated(text) == text, "run: python -m tests.benchmarks.tables"


def test_a_table_of_lengths_has_what_was_measured_and_says_which_run(tmp_path):
    folder = tmp_path / "long_sequence"
    folder.mkdir()
    figures = {
        "device_gib": 1.5,
        "host_gib": 2.0,
        "tokens_per_second": 1e3,
        "tflops": 3.0,
        "method_tflops": 9.0,
        "mfu": 0.25,
    }
    cases = [
        {"length": 1024, "status": "ok", "seconds": 4.0, "timed_step": 2, **figures},
        {"length": 2048, "status": "ok", "seconds": 9.0, "timed_step": 1, **figures},
        {"length": 4096, "status": "out of memory"},
        {"length": 8192, "status": "failed"},
    ]
    made = {
        "machine": {
            "device": "H",
            "driver": "1",
            "cuda": "2",
            "torch": "3",
            "commit": "4",
            "date": "5",
            "command": "run it",
        },
        "rungs": [{"name": "full", "says": "all of it", "computed_layers": 8, "cases": cases}],
    }
    (folder / "a.json").write_text(json.dumps(made))
    lines = tables.updated("<!-- lengths:a -->\nold\n<!-- /lengths -->\n", tmp_path).splitlines()
    assert lines[3] == "| `full`: all of it, 8 layers computed | 1,024 | 1.5 | 2.0 | 4 | 1,000 | 3 | 25.0 % |"
    assert "| 2,048 | 1.5 | 2.0 | 9 (first) |" in lines[4] and "| 4,096 | out of memory |" in lines[5]
    assert "run it" in lines[7] and "8,192" not in " ".join(lines)
    variant = {"name": "on", "says": "tiled", "cases": cases[:1], "batches": [cases[0] | {"batch_size": 4}]}
    (folder / "b.json").write_text(json.dumps({"machine": made["machine"], "variants": [variant]}))
    lines = tables.updated("<!-- lengths:b -->\nold\n<!-- /lengths -->\n", tmp_path).splitlines()
    assert "| `on`: tiled | 1 x 1,024 | 1.5 |" in lines[3] and "| `on`: tiled | 4 x 1,024 | 1.5 |" in lines[4]


def test_table_of_explicit_masks(tmp_path):
    (tmp_path / "long_sequence").mkdir()
    cost = {"seconds": 0.0015, "peak_bytes": 2**21}
    none = {"seconds": None, "peak_bytes": None}
    rows = [
        {"seq_len": 4096, "way": "here", "chosen": False, "build": cost, "step": cost},
        {"seq_len": 4096, "way": "there", "chosen": True, "build": {**cost, "seconds": 1.5}, "step": none},
    ]
    about = dict.fromkeys(("device", "driver", "cuda", "torch", "commit", "date"), "x") | {"command": "run it"}
    made = {"machine": about, "parts": {"masks": {"model": "small", "threshold": 2048, "rows": rows}}}
    (tmp_path / "long_sequence" / "m.json").write_text(json.dumps(made))
    lines = tables.updated("<!-- masks:m -->\nold\n<!-- /masks -->\n", tmp_path).splitlines()
    assert lines[3] == "| 4,096 | 1.5, 2 / 1.5, 2 | **1,500, 2 / out of memory** |"
    assert lines[5] == "small; threshold 2,048 tokens\\" and "run it" in lines[6] and "old" not in lines


def test_every_committed_record_can_be_read():
    for path in sorted(tables.RESULTS.glob("*.json")):
        assert table.render(record.read(path)), path


def test_plot_takes_the_longest_sweep_over_l(made, tmp_path):
    title, results = plot.sweep(made)
    assert title == "triangle attention, N = L, 4 heads, head dim 32, bf16"
    assert plot.points(results, "flex", "fwd") == [(256, 0.067), (1024, 3.04)]
    assert plot.points(results, "flex", "fwd+bwd") == [(256, 0.511)]
    assert plot.points(results, "ours[sm80]", "memory") == [(256, 8.0), (1024, 8.0)]
    plot.draw(made, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_plot_of_nothing(made, tmp_path):
    empty = {**copy.deepcopy(made), "results": []}
    assert plot.sweep(empty) == ("nothing to plot", [])
    plot.draw(empty, tmp_path / "p.png")


def test_shapes_by_name_group_and_pattern():
    assert [shape.name for shape in chosen_shapes("msa-row,triangle-5*")] == [
        "msa-row",
        "triangle-512",
        "triangle-511",
    ]
    assert chosen_shapes("bars,triangle-256") == list(GROUPS["bars"])
    lengths = [256, 384, 512, 768, 1024, 2048, 3072, 4096, 511, 1000, 1217, 1280]
    assert [shape.k_len for shape in chosen_shapes("lengths,tails")] == lengths
    assert [shape.name for shape in chosen_shapes("triangle-3072")] == ["triangle-3072"]
    with pytest.raises(ValueError, match="--shapes takes bars, uses, lengths, tails, small, .*; got 'nosuch'"):
        chosen_shapes("msa-row,nosuch")


def test_peers_and_passes_by_name():
    assert [peer.name for peer in chosen_peers("sdpa,flex", [])] == ["sdpa", "flex"]
    assert [peer.name for peer in chosen_peers("all", ["eager"])] == ["eager"]
    assert chosen_peers("none", ["eager"]) == []
    assert chosen_passes("fwd+bwd") == ("fwd+bwd",)
    with pytest.raises(ValueError, match="--peers takes flex, .*; got 'nosuch'"):
        chosen_peers("sdpa,nosuch", [])
    with pytest.raises(ValueError, match="--passes takes fwd, fwd\\+bwd; got 'bwd'"):
        chosen_passes("bwd")


def test_command_line_on_the_cpu(tmp_path, capsys):
    files = {"--json": tmp_path / "b.json", "--plot": tmp_path / "b.png"}
    arguments = ["--device", "cpu", "--quick", "--min-ms", "0.1", "--impl", "reference", "--peers", "sdpa,trifast"]
    assert main([*arguments, *(str(word) for pair in files.items() for word in pair)]) == 0
    out = capsys.readouterr().out
    assert "small-triangle  fp32   fwd+bwd" in out and "ours[reference] ms  sdpa ms" in out
    assert "trifast: missing, everywhere" in out
    assert {entry["status"] for entry in record.read(files["--json"])["results"]} == {"ok", "missing"}
    assert files["--plot"].exists()


def test_command_line_with_a_gate(tmp_path, capsys):
    """The op with its gate is the baseline of the op and a gate apart; a peer without one says so."""
    path = tmp_path / "b.json"
    arguments = ["--device", "cpu", "--quick", "--min-ms", "0.1", "--gate", "--impl", "tiled", "--json", str(path)]
    assert main(arguments) == 0
    assert "; gate of the output; " in capsys.readouterr().out
    made = record.read(path)
    assert made["ours"] == ["ours[tiled]", "ours[tiled]-gate-apart"] == table.implementations(made)
    assert all(entry["status"] == "ok" and entry["case"]["gate"] for entry in made["results"])
    assert all("dgate" in entry["errors"] for entry in made["results"] if entry["which"] == "fwd+bwd")
    assert main([*arguments, "--peers", "eager"]) == 0
    assert "eager: refused, everywhere: has no gate" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--shapes", "nosuch"], ["--peers", "nosuch"], ["--dtype", "fp8"]])
def test_command_line_refuses_unknown_names(arguments, capsys):
    assert main(["--device", "cpu", *arguments]) == 2
    assert "got" in capsys.readouterr().err


def test_command_line_fails_when_ours_cannot_be_timed(monkeypatch, capsys):
    def wrong(case, errors):
        return "wrong on purpose"

    monkeypatch.setattr("tests.benchmarks.measure.wrong_reason", wrong)
    assert main(["--device", "cpu", "--quick", "--impl", "reference", "--peers", "none"]) == 1
    assert "WRONG" in capsys.readouterr().out

# SPDX-License-Identifier: Apache-2.0
"""Keeps the tables of the READMEs equal to the committed records.

    python -m tests.benchmarks.tables           # rewrites the tables of README.md and examples/genslm/README.md
    python -m tests.benchmarks.tables --check   # exit code 1 if one is out of date

A table stands between two comments. The name is that of a record in `tests/benchmarks/results/`:

    <!-- bench:h100 show=time columns=ours[sm80],flex,sdpa -->
    <!-- /bench:h100 -->

Options, all optional: `show` (time: milliseconds of every pass; memory: peak MiB of forward + backward above the
inputs), `columns` (implementations, default all that were timed), `shapes` (names, default all).

How long sequences train is a table of every length in some records of `results/long_sequence/`:

    <!-- lengths:h100-steps_65536,h100-steps_131072 -->
    <!-- /lengths -->

The longest sequence of every rung of such records, which causal attention is fastest, and how exact it is:

    <!-- ladder:h100-ladder_short,h100-flash -->
    <!-- /ladder -->
    <!-- attention:h100-causal_attention -->
    <!-- /attention -->
    <!-- accuracy:h100-causal_accuracy -->
    <!-- /accuracy -->

What explicit masks cost, of a record of `two_gpus` there:

    <!-- masks:h200-two_gpus -->
    <!-- /masks -->
"""

import argparse
import json
import re
from pathlib import Path

from tests.benchmarks.causal_accuracy import markdown_accuracy
from tests.benchmarks.causal_attention import markdown_attention
from tests.benchmarks.long_sequence.report import markdown_ladder, markdown_lengths
from tests.benchmarks.record import machine_line, read
from tests.benchmarks.table import cell, implementations, memory_cell
from tests.benchmarks.two_gpus.report import markdown_masks

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
FILES = [ROOT / "README.md", ROOT / "examples" / "genslm" / "README.md"]
BLOCK = re.compile(r"<!-- bench:(?P<name>[\w.-]+)(?P<options>[^>]*?) -->\n.*?<!-- /bench:(?P=name) -->", re.S)
LENGTHS = re.compile(r"<!-- lengths:(?P<names>[\w.,-]+) -->\n.*?<!-- /lengths -->", re.S)
LADDER = re.compile(r"<!-- ladder:(?P<names>[\w.,-]+) -->\n.*?<!-- /ladder -->", re.S)
ATTENTION = re.compile(r"<!-- attention:(?P<name>[\w.-]+) -->\n.*?<!-- /attention -->", re.S)
ACCURACY = re.compile(r"<!-- accuracy:(?P<name>[\w.-]+) -->\n.*?<!-- /accuracy -->", re.S)
MASKS = re.compile(r"<!-- masks:(?P<name>[\w.-]+) -->\n.*?<!-- /masks -->", re.S)
OPTIONS = {"show": "time", "columns": "", "shapes": ""}


def options_of(text: str) -> dict[str, str]:
    """Options of a marker; ValueError for one that does not exist."""
    options = dict(OPTIONS)
    for word in text.split():
        key, _, value = word.partition("=")
        if key not in OPTIONS:
            raise ValueError(f"a table's options are {', '.join(OPTIONS)}; got {word!r}")
        options[key] = value
    if options["show"] not in ("time", "memory"):
        raise ValueError(f"show must be time or memory, got {options['show']!r}")
    return options


def _dimensions(case: dict) -> str:
    """N x L, H, D as the README writes a shape; Lk only where it differs, B only above 1. Of a block: its tables."""
    if "n_res" in case:
        return f"MSA {case['n_seq']} x {case['n_res']}" if case["n_seq"] else f"{case['n_res']} x {case['n_res']}"
    length = f"{case['q_len']}" if case["q_len"] == case["k_len"] else f"{case['q_len']}:{case['k_len']}"
    batch = "" if case["batch"] == 1 else f"{case['batch']} x "
    return f"{batch}{case['rows']} x {length}, {case['heads']}, {case['head_dim']}"


def _figure(result: dict | None, show: str) -> str:
    return memory_cell(result) if show == "memory" else cell(result, None)


def markdown(record: dict, options: dict[str, str]) -> str:
    """One table: a line per shape, dtype and mode; a column per implementation; passes joined by a slash."""
    show = options["show"]
    timed = {result["implementation"] for result in record["results"] if result["status"] == "ok"}
    columns = [name for name in implementations(record) if name in timed]
    if options["columns"]:
        columns = options["columns"].split(",")
    shapes = set(options["shapes"].split(",")) if options["shapes"] else None
    passes = list(dict.fromkeys(result["which"] for result in record["results"]))
    if show == "memory":
        passes = [which for which in passes if which == "fwd+bwd"] or passes
    lines: dict[tuple, dict[tuple, dict]] = {}
    for result in record["results"]:
        case = result["case"]
        if shapes is None or case["name"] in shapes:
            line = (case["name"], _dimensions(case), case["dtype"], result["mode"])
            lines.setdefault(line, {})[result["implementation"], result["which"]] = result
    if show == "memory":
        lines = {line: results for line, results in lines.items() if line[3] == "eager"}
    unit = f"{' / '.join(passes)}, ms" if show == "time" else "extra MiB"
    of_blocks = any("n_res" in result["case"] for result in record["results"])
    shape_form = "block (" if of_blocks else "shape (N x L, H, D; "
    rows = [
        f"| {shape_form}{unit}) | " + " | ".join(columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for (name, dimensions, dtype, mode), results in lines.items():
        cells = [" / ".join(_joined([_figure(results.get((c, which)), show) for which in passes])) for c in columns]
        label = f"{name} ({dimensions}), {dtype}" + (", CUDA graph" if mode == "graph" else "")
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    about = record["machine"]
    return "\n".join([*rows, "", f"{machine_line(about)} | `{about['command']}`", ""])


def _joined(figures: list[str]) -> list[str]:
    """One word where every pass says the same, as OOM."""
    return figures[:1] if len(set(figures)) == 1 else figures


def updated(text: str, results: Path = RESULTS) -> str:
    """`text` with every table generated anew."""

    def replace(match: re.Match) -> str:
        name = match["name"]
        table = markdown(read(results / f"{name}.json"), options_of(match["options"]))
        return f"<!-- bench:{name}{match['options']} -->\n{table}<!-- /bench:{name} -->"

    def long_sequence(name):
        return json.loads((results / "long_sequence" / f"{name}.json").read_text())

    def of_several(kind, form):
        def replace(match: re.Match) -> str:
            table = form([long_sequence(name) for name in match["names"].split(",")])
            return f"<!-- {kind}:{match['names']} -->\n{table}<!-- /{kind} -->"

        return replace

    def of_one(kind, form):
        def replace(match: re.Match) -> str:
            return f"<!-- {kind}:{match['name']} -->\n{form(long_sequence(match['name']))}<!-- /{kind} -->"

        return replace

    text = BLOCK.sub(replace, text)
    text = LENGTHS.sub(of_several("lengths", markdown_lengths), text)
    text = LADDER.sub(of_several("ladder", markdown_ladder), text)
    text = ATTENTION.sub(of_one("attention", markdown_attention), text)
    text = ACCURACY.sub(of_one("accuracy", markdown_accuracy), text)
    return MASKS.sub(of_one("masks", markdown_masks), text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=FILES)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is out of date")
    options = parser.parse_args()
    stale = 0
    for path in options.files:
        text = path.read_text()
        if text == updated(text):
            continue
        stale += 1
        print(f"{path}: {'out of date' if options.check else 'updated'}")
        if not options.check:
            path.write_text(updated(text))
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())

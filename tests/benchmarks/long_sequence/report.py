# SPDX-License-Identifier: Apache-2.0
"""Record, table and plot of the long-sequence benchmarks."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

from deepspeed_ds4sci.training import step_flops
from tests.benchmarks.record import machine_line
from tests.benchmarks.table import aligned

_MACHINE = """
import json, sys, torch
from deepspeed_ds4sci.training import peak_flops
from tests.benchmarks.record import machine
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
peak = peak_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
print(json.dumps(machine(device, sys.argv[1:]) | {"peak_flops": peak.per_second, "peak_source": peak.source}))
"""


def about(module: str, arguments: list[str]) -> dict:
    """What the figures depend on. Found in a process of its own, so that none of the GPU's memory is taken."""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", _MACHINE, *arguments], cwd=root, capture_output=True, text=True, timeout=180
    )
    if done.returncode != 0:
        raise RuntimeError(f"the machine cannot be described: {done.stderr[-1000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["command"] = found["command"].replace("tests.benchmarks", module, 1)
    return found


def write(path: Path, record: dict) -> None:
    """Whole or not at all: a run that is cut off leaves the last complete record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    scratch.replace(path)


def with_rates(case: dict, config, ranks: int, peak: float) -> dict:
    """A case with tokens/s, and TFLOP/s per GPU in both counts, where it worked."""
    if case["status"] != "ok":
        return case
    sequences = case["batch_size"] / case["seconds"] / ranks
    tflops = {
        count: sequences * step_flops(config, case["length"], count=count) / 1e12 for count in ("model", "method")
    }
    return case | {
        "tokens_per_second": case["batch_size"] * case["length"] / case["seconds"],
        "tflops": tflops["model"],
        "method_tflops": tflops["method"],
        "mfu": tflops["model"] * 1e12 / peak,
    }


def first_was_timed(case: dict) -> bool:
    """Whether a case's seconds are those of the first step at its length, which does more than the others."""
    if "timed_step" in case:
        return case["timed_step"] == 1
    return case.get("first_seconds") == case["seconds"]  # older records


def cells(case: dict | None) -> list[str]:
    """Of a table line: device GiB, host GiB, seconds, tokens/s, TFLOP/s, MFU, TFLOP/s by the method's count."""
    if case is None:
        return ["-"] * 7
    if case["status"] != "ok":
        return [case["status"], *["-"] * 6]
    return [
        f"{case['device_gib']:.1f}",
        f"{case['host_gib']:.1f}",
        f"{case['seconds']:.3g}" + (" (first)" if first_was_timed(case) else ""),
        f"{case['tokens_per_second']:,.0f}",
        f"{case['tflops']:.3g}",
        f"{100 * case['mfu']:.1f} %",
        f"{case['method_tflops']:.3g}",
    ]


LADDERS = {"mask": "explicit mask", "flash": "no explicit mask", "alst": "DeepSpeed's ALST path"}
"""In the order of tables and plots."""

HEADS = ["device GiB", "host GiB", "s/step", "tokens/s", "TFLOP/s/GPU", "MFU", "method's TFLOP/s"]


def ladder_table(record: dict) -> str:
    """One line per rung: the longest sequence, and figures at that length."""
    rows = [["rung", "what", "GPUs", "longest", "failed at", "because", *HEADS]]
    for rung in record["rungs"]:
        worked = [case for case in rung["cases"] if case["status"] == "ok"]
        at = max(worked, key=lambda case: case["length"], default=None)
        failed = f"{rung['failed']:,}" if rung["failed"] else "-"
        name = rung["name"] + (f" [{rung['computed_layers']} layers computed]" if rung["computed_layers"] else "")
        longest = f"{rung['longest']:,}" if rung["longest"] else "none"
        rows.append([name, rung["says"], str(rung["gpus"]), longest, failed, rung["because"] or "-", *cells(at)])
    return aligned(rows)


def markdown_lengths(records: list[dict]) -> str:
    """For a README: a line per length that a rung or variant of the records tried, in their order, and their runs."""
    columns = [(column, HEADS.index(column)) for column in HEADS if column != "method's TFLOP/s"]
    lines = _lines(records)
    of_batches = any(case.get("batch_size", 1) > 1 for line in lines for case in _cases(line))
    rows = ["| rung | tokens | " + " | ".join(name for name, _ in columns) + " |"]
    rows.append("|---" * (2 + len(columns)) + "|")
    for line in lines:
        layers = f", {line['computed_layers']} layers computed" if line.get("computed_layers") else ""
        for case in _cases(line):
            if case["status"] == "failed":  # not for want of memory or time: nothing was measured
                continue
            figures = " | ".join(cells(case)[index] for _, index in columns)
            tokens = f"{case.get('batch_size', 1)} x {case['length']:,}" if of_batches else f"{case['length']:,}"
            rows.append(f"| `{line['name']}`: {line['says']}{layers}{_on(line)} | {tokens} | {figures} |")
    return "\n".join([*rows, "", _runs(records), ""])


def markdown_ladder(records: list[dict]) -> str:
    """For a README: a line per rung of the records that trained, by ladder, else in their order: the longest sequence,
    how it is known, and the figures of a complete step there. Of a rung that several records have: all lengths where
    card, commit and config are the same, else the last one's."""
    columns = [column for column in HEADS if column not in ("method's TFLOP/s", "TFLOP/s/GPU")]
    rows = ["| rung | GPUs | longest | failed at | " + " | ".join(columns) + " |", "|---" * (4 + len(columns)) + "|"]
    for rung in _by_ladder(records):
        at = next(case for case in rung["cases"] if case["length"] == rung["longest"])
        shown = dict(zip(HEADS, cells(at), strict=True))
        if rung["computed_layers"]:
            shown |= dict.fromkeys(("s/step", "tokens/s", "MFU"), f"{rung['computed_layers']} layers computed")
        beyond = f"none, of up to {rung['longest']:,}" if rung.get("ended") == "limit" else "not tried"
        failed = f"{rung['failed']:,}, {rung['because']}" if rung["failed"] else beyond
        figures = " | ".join(shown[column] for column in columns)
        name = f"`{rung['name']}`: {rung['says']}{_on(rung)}"
        rows.append(f"| {name} | {rung['gpus']} | {rung['longest']:,} | {failed} | {figures} |")
    return "\n".join([*rows, "", _runs(records), ""])


def _runs(records):
    return "\\\n".join(f"{machine_line(record['machine'])} | `{record['machine']['command']}`" for record in records)


def together(records: list[dict]) -> dict:
    """The rungs of several records that trained as one, by ladder, for a plot."""
    return {"machine": _machines(records), "rungs": _by_ladder(records)}


def variants_together(records: list[dict]) -> dict:
    """The variants of several records, one after the other, for a plot that joins those of one name, whatever the
    commit and the number of steps."""
    return {"machine": _machines(records), "variants": [each for record in records for each in record["variants"]]}


def _machines(records):
    machines = [record["machine"] for record in records]
    said = ("device", "driver", "cuda", "torch", "commit", "date")
    return {key: ", ".join(dict.fromkeys(each[key] for each in machines)) for key in said}


def _by_ladder(records):
    rungs = {}
    for rung in _lines(records):
        before = rungs.get(rung["name"])
        if before is not None and all(before.get(what) == rung.get(what) for what in _SAME_RUNG):
            rung = _joined(before, rung)
        if rung["longest"] or before is None:
            rungs[rung["name"]] = rung
    trained = [rung for rung in rungs.values() if rung["longest"]]
    return sorted(trained, key=lambda rung: list(LADDERS).index(rung["ladder"]))


_SAME_RUNG = ("card", "commit", "computed_layers", "says", "ds_config")
"""Where records agree in these, the lengths of one go on where those of the other ended."""


def _joined(before, rung):
    """A rung of two records: the lengths of both. One that trained stays good."""
    cases = {case["length"]: case for case in before["cases"]}
    for case in rung["cases"]:
        if case["status"] == "ok" or cases.get(case["length"], case)["status"] != "ok":
            cases[case["length"]] = case
    longest = max((length for length, case in cases.items() if case["status"] == "ok"), default=0)
    failed = min(
        (length for length, case in cases.items() if case["status"] != "ok" and length > longest), default=None
    )
    because = cases[failed]["status"] if failed else None
    joined = {"longest": longest, "failed": failed, "because": because, "ended": None}
    return rung | joined | {"cases": [case for _, case in sorted(cases.items())]}


def _lines(records):
    """Rungs or variants with their commit, and "card" where the records are of several and this one is not of the
    first."""
    lines = []
    for record in records:
        device, usual = record["machine"]["device"], records[0]["machine"]["device"]
        card = {} if device == usual else {"card": device.removeprefix("NVIDIA ")}
        about = card | {"commit": record["machine"]["commit"]}
        lines += [line | about for line in (record["rungs"] if "rungs" in record else record["variants"])]
    return lines


def _on(line):
    return f", on {line['card']}" if "card" in line else ""


def _cases(line: dict) -> list[dict]:
    return [*line["cases"], *line.get("batches", [])]


def draw_ladder(record: dict, path: Path) -> None:
    """Longest sequence per rung, hatched where none failed; TFLOP/s of every length tried, where all layers were
    computed."""
    pyplot = _pyplot()
    rungs = record["rungs"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, max(5, 0.35 * len(rungs))), layout="constrained")
    colours = dict(zip(LADDERS, ("C0", "C1", "C2"), strict=True))
    hatch = dict(hatch="//", edgecolor="white")
    for i, rung in enumerate(rungs):
        colour = colours[rung["ladder"]]
        left.barh(i, rung["longest"] / 1024, color=colour, **({} if rung["failed"] else hatch))
        text = f" {'' if rung['failed'] else '≥ '}{rung['longest']:,}"
        left.text(rung["longest"] / 1024, i, text, va="center", fontsize="x-small")
        line = sorted((c["length"] / 1024, c["tflops"]) for c in rung["cases"] if c["status"] == "ok")
        if line and not rung["computed_layers"]:
            right.plot(*zip(*line, strict=True), "o-", color=colour, alpha=0.7)
            right.annotate(_drawn_name(rung), line[-1], fontsize="x-small")
    shown = [ladder for ladder in LADDERS if any(rung["ladder"] == ladder for rung in rungs)]
    legend = [pyplot.Rectangle((0, 0), 1, 1, color=colours[ladder], label=LADDERS[ladder]) for ladder in shown]
    if any(rung["failed"] is None for rung in rungs):
        says = "trains; longer ones were not tried"
        legend.append(pyplot.Rectangle((0, 0), 1, 1, facecolor="grey", label=says, **hatch))
    left.set_yticks(range(len(rungs)), [_drawn_name(rung) for rung in rungs], fontsize="small")
    left.invert_yaxis()
    left.set(xscale="log", xlabel="longest sequence, 1024 tokens", title="How long a sequence trains")
    left.margins(x=0.15)
    left.legend(handles=legend, fontsize="small")
    right.set(
        xscale="log", xlabel="1024 tokens", ylabel="TFLOP/s per GPU (causal, no recomputation)", title="How fast"
    )
    right.margins(x=0.25)  # names stand to the right of the last point
    right.grid(alpha=0.3)
    _save(figure, record, path)


def _drawn_name(rung):
    layers = [f"{rung['computed_layers']} layers"] if rung["computed_layers"] else []
    words = ", ".join([*layers, *([rung["card"]] if "card" in rung else [])])
    return rung["name"] + (f" [{words}]" if words else "")


def draw_lengths(record: dict, path: Path) -> None:
    """TFLOP/s against the length and tokens/s against the batch size, each where there is more than one.

    A cross is where memory ended, at the height of the longest that trains.
    """
    pyplot = _pyplot()
    by_length, by_batch, ended = {}, {}, {}
    for variant in record["variants"]:
        name = f"{variant['says']} (`{variant['name']}`)"
        of_one = [case for case in variant["cases"] if case["batch_size"] == 1]
        line = by_length.setdefault(name, [])
        line += [(case["length"], case["tflops"]) for case in of_one if case["status"] == "ok"]
        ended.setdefault(name, []).extend(case["length"] for case in of_one if case["status"] == "out of memory")
        for case in variant["batches"]:
            if case["status"] == "ok":
                line = by_batch.setdefault(f"{variant['name']}, {case['length']} tokens", [])
                line.append((case["batch_size"], case["tokens_per_second"]))
    panels = [
        (by_length, "tokens per sequence", "TFLOP/s per GPU (causal, no recomputation)"),
        (by_batch, "sequences per step", "tokens/s"),
    ]
    panels = [panel for panel in panels if any(len(line) > 1 for line in panel[0].values())] or panels[:1]
    size = (1 + 6 * len(panels), 5)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (lines, what, unit) in zip(axes[0], panels, strict=True):
        crossed = False
        for label, line in lines.items():
            if not line:
                continue
            (drawn,) = axis.plot(*zip(*sorted(line), strict=True), "o-", label=label)
            longest, height = max(line)
            too_long = [length for length in ended.get(label, []) if length > longest]
            if too_long:
                axis.plot(min(too_long), height, "x", markersize=9, color=drawn.get_color())
                crossed = True
        if crossed:
            axis.plot([], [], "kx", label="out of memory")
        axis.set(xlabel=what, ylabel=unit)
        _powers_of_two(axis)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="x-small")
    _save(figure, record, path)


def _powers_of_two(axis):
    """A tick at each value of the lines, in words."""
    at = sorted({value for line in axis.lines for value in line.get_xdata()})
    axis.set_xscale("log", base=2)
    axis.set_xticks(at, [f"{value // 1024:g}K" if value % 1024 == 0 else f"{value:g}" for value in at])
    axis.minorticks_off()


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, record, path):
    title = textwrap.wrap(machine_line(record["machine"]), int(figure.get_figwidth() * 15))  # as many fit an inch
    figure.suptitle("\n".join(title), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)

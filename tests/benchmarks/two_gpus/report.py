# SPDX-License-Identifier: Apache-2.0
"""A record of `two_gpus` as text and as a picture. Both take a record that lacks parts."""

import math
from pathlib import Path

from tests.benchmarks.record import machine_line

_MIB = 2**20


def text(record: dict) -> str:
    """Every part that is there, one table each."""
    parts = record["parts"]
    lines = [machine_line(record["machine"]), f"{record['machine']['command']}"]
    for name, section in (
        ("equality", _equality),
        ("curves", _curves),
        ("table", _table),
        ("longest", _longest),
        ("masks", _masks),
    ):
        if name not in parts:
            continue
        seconds = record["seconds"][name]
        lines += ["", f"== {name} ({seconds:.0f} s)"]
        found = parts[name]
        lines += [f"FAILED: {found['error']}"] if "error" in found else section(found)
        lines += [f"{run} FAILED: {error}" for run, error in found.get("failed", {}).items()]
    return "\n".join(lines)


def _equality(found):
    yield f"{'case':60} {'loss':>9} {'gradient':>9} {'step':>9}   limit {found['limit']:.0e}"
    for row in found["rows"]:
        if "error" in row:
            yield f"{row['case']:60} FAILED: {row['error'].strip().splitlines()[-1]}"
            continue
        figures = " ".join(f"{row[kind]:9.1e}" for kind in ("loss", "gradient", "step"))
        yield f"{row['case']:60} {figures}   {'holds' if row['holds'] else 'EXCEEDED'}"


def _curves(found):
    yield f"{found['model']}; largest distance of a loss from one rank's in bf16, over {found['steps']} steps"
    for name, run in found["runs"].items():
        cost = f"{run['step_seconds'] * 1e3:.1f} ms/step, {run['peak_bytes'] / _MIB:.0f} MiB peak"
        distance = found["distances"].get(name, math.nan)
        first, last = run["losses"][0], run["losses"][-1]
        yield f"{name:22} {distance:.2e}   loss {first:.4f} -> {last:.4f}   {cost}"


def _table(found):
    one = found["one rank"]
    yield f"fp32, AdamW, table [{one['rows']}, {one['dim']}]; MiB per rank"
    columns = [key for key in ("weight", "gradient", "optimizer_state", "allocated") if key in one]
    yield " " * 22 + " ".join(f"{name:>16}" for name in columns)
    for name, row in found.items():
        yield f"{name:22}" + " ".join(f"{row[key] / _MIB:16.2f}" for key in columns)


def _longest(found):
    yield found["model"]
    for name, run in found["runs"].items():
        failed = run["failed"]
        beyond = f"out of memory at {failed}" if failed else "no longer one was tried"
        last = run["probes"][str(run["longest"])]
        peak, seconds = last["peak_bytes"] / 2**30, last["seconds"]
        yield f"{name:22} {run['longest']:8d} tokens ({beyond}), {peak:.1f} GiB peak, {seconds:.2f} s/step"
    if found["ratio"]:
        yield f"ratio {found['ratio']:.2f}"


def _masks(found):
    yield f"{found['model']}; threshold {found['threshold']} tokens; * what the factory with this threshold does"
    yield f"{'tokens':>8} {'mask built':24} {'build ms':>10} {'peak MiB':>10} {'step ms':>10} {'peak MiB':>10}"
    for row in found["rows"]:
        way = row["way"] + (" *" if row["chosen"] else "")
        cells = [
            _cell(row[part][key], scale)
            for part in ("build", "step")
            for key, scale in (("seconds", 1e3), ("peak_bytes", 1 / _MIB))
        ]
        yield f"{row['seq_len']:8d} {way:24} {' '.join(cells)}"


def markdown_masks(record: dict) -> str:
    """For a README: a line per length, what the factory of explicit masks does at it and what else could be done."""
    found = record["parts"]["masks"]
    ways = dict.fromkeys(row["way"] for row in found["rows"])
    figures = {(row["seq_len"], row["way"]): row for row in found["rows"]}
    rows = ["| tokens (build / step: ms, device MiB) | " + " | ".join(ways) + " |", "|---" * (1 + len(ways)) + "|"]
    for length in dict.fromkeys(row["seq_len"] for row in found["rows"]):
        cells = []
        for way in ways:
            row = figures.get((length, way))
            if row is None:  # the run was cut off
                cells.append("-")
                continue
            text = " / ".join(
                "out of memory"
                if row[part]["seconds"] is None
                else f"{_figure(row[part]['seconds'] * 1e3)}, {_figure(row[part]['peak_bytes'] / _MIB)}"
                for part in ("build", "step")
            )
            cells.append(f"**{text}**" if row["chosen"] else text)
        rows.append(f"| {length:,} | " + " | ".join(cells) + " |")
    about = record["machine"]
    where = f"{found['model']}; threshold {found['threshold']:,} tokens"
    return "\n".join([*rows, "", f"{where}\\\n{machine_line(about)} | `{about['command']}`", ""])


def _figure(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(value, scale):
    return f"{'-':>10}" if value is None else f"{value * scale:10.2f}"


def succeeded(record: dict) -> bool:
    """Whether every part came out, and no equality is exceeded."""
    parts = record["parts"].values()
    rows = record["parts"].get("equality", {}).get("rows", [])
    return not any("error" in part or part.get("failed") for part in parts) and all(row.get("holds") for row in rows)


def draw(record: dict, path: Path) -> None:
    """The loss curves and their distances, the longest sequences, and the masks; the format follows the suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("curves", _draw_losses),
        ("curves", _draw_distances),
        ("longest", _draw_longest),
        ("masks", _draw_masks),
    )
    ran = [panel for panel in panels if panel[0] in record["parts"]] or panels[:1]
    rows = -(-len(ran) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(12, 4 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(ran) :]:
        axis.set_axis_off()
    for axis, (name, panel) in zip(axes.flat, ran, strict=False):
        found = record["parts"].get(name)
        if found is None or "error" in found:
            axis.set(title=f"{name}: no result")
            continue
        panel(axis, found)
        axis.grid(alpha=0.3)
    figure.suptitle(machine_line(record["machine"]), fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_losses(axis, found):
    for index, (name, run) in enumerate(found["runs"].items()):
        axis.plot(run["losses"], label=name, linewidth=3 - 0.7 * index, alpha=0.8)
    axis.set(xlabel="step", ylabel="loss", title=found["model"])
    axis.legend()


def _draw_distances(axis, found):
    base = found["runs"].get(found["base"], {}).get("losses")
    for name, run in found["runs"].items():
        if base and name != found["base"]:
            gaps = [abs(mine - theirs) for mine, theirs in zip(run["losses"], base, strict=True)]
            axis.plot(gaps, label=name)
    axis.set(xlabel="step", yscale="log", title=f"distance of the loss from: {found['base']}")
    if axis.lines:
        axis.legend()


def _draw_longest(axis, found):
    for name, run in found["runs"].items():
        probes = sorted((int(seq_len), probe["peak_bytes"] / 2**30) for seq_len, probe in run["probes"].items())
        (line,) = axis.plot(*zip(*probes, strict=True), marker="o", label=f"{name}: {run['longest']} tokens")
        if run["failed"]:
            axis.axvline(run["failed"], color=line.get_color(), linestyle=":")
    axis.set(xlabel="tokens (dotted: out of memory)", ylabel="peak, GiB per rank", title="longest sequence")
    if found["runs"]:
        axis.legend()


def _draw_masks(axis, found):
    for way in dict.fromkeys(row["way"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["way"] == way and row["build"]["peak_bytes"]]
        if rows:
            peaks = [row["build"]["peak_bytes"] / _MIB for row in rows]
            axis.plot([row["seq_len"] for row in rows], peaks, marker="o", label=way)
    axis.axvline(found["threshold"], color="grey", linestyle=":")
    axis.set(xlabel="tokens (dotted: the threshold)", ylabel="MiB", yscale="log", title="device peak while building")
    if axis.lines[:-1]:
        axis.legend()

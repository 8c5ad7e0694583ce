# SPDX-License-Identifier: Apache-2.0
"""The share of attention for a terminal, and the plot: a bar per variant, time beside memory."""

from pathlib import Path

from tests.benchmarks.record import machine_line
from tests.benchmarks.table import aligned, by_line, implementations, milliseconds


def render_shares(record: dict) -> str | None:
    """Time in attention and its share of the block, and seconds of the first run; None if nothing was timed."""
    rows = [["shape", "variant", "block ms", "attention ms", "share", "rest ms", "first run s"]]
    for result in record["results"]:
        if result["status"] != "ok":
            continue
        block, attention = result["timing"]["median"], result["attention"]
        figures = ["-", "-", "-"]
        if attention is not None:
            inside = attention["median"]
            figures = [milliseconds(inside), f"{100 * inside / block:.0f}%", milliseconds(block - inside)]
        first = f"{result['first_s']:.1f}"
        rows.append([result["case"]["name"], result["implementation"], milliseconds(block), *figures, first])
    return aligned(rows) if len(rows) > 1 else None


PANELS = {
    "time": "forward + backward, ms (inner bar: attention alone)",
    "memory": "extra memory, forward + backward, MiB",
}


def height(result: dict, panel: str) -> float | None:
    """Length of a bar; None where there is no figure."""
    if result["status"] != "ok":
        return None
    return result["timing"]["median"] if panel == "time" else result["extra_mib"]


def draw_bar(axis, place: int, result: dict | None, panel: str, color: str) -> None:
    """One bar and the figure at its end."""
    value = None if result is None else height(result, panel)
    if value is None:
        text = result["status"] if result is not None and result["status"] != "ok" else "no figure"
        value = 0.0
    else:
        text = milliseconds(value) if panel == "time" else f"{value:.0f}"
    axis.barh(place, value, color=color)
    if panel == "time" and value and result["attention"] is not None:
        axis.barh(place, result["attention"]["median"], color="black", alpha=0.35, height=0.4)
    axis.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center")


def draw(record: dict, path: Path) -> None:
    """Writes the picture; the format follows the file's suffix. What has no figure stands there as its status."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines, names = by_line(record), implementations(record)
    size = (12, 1.2 + max(1, len(lines)) * (0.8 + 0.35 * len(names)))
    figure, axes = plt.subplots(max(1, len(lines)), len(PANELS), figsize=size, squeeze=False, layout="constrained")
    for row, ((shape, dtype, *_), results) in zip(axes, lines.items(), strict=False):
        for axis, (panel, label) in zip(row, PANELS.items(), strict=True):
            for place, name in enumerate(names):
                draw_bar(axis, place, results.get(name), panel, "tab:blue" if name in record["ours"] else "tab:gray")
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.set_xlim(left=0)
            axis.set_title(f"{shape}, {dtype}: {label}", fontsize="medium")
    figure.suptitle(machine_line(record["machine"]), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)

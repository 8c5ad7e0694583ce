# SPDX-License-Identifier: Apache-2.0
"""Time and memory against L, a line per implementation."""

from collections import defaultdict
from pathlib import Path

from tests.benchmarks.record import machine_line
from tests.benchmarks.table import implementations

PANELS = {
    "fwd": "forward, ms",
    "fwd+bwd": "forward + backward, ms",
    "memory": "extra memory, forward + backward, MiB",
}


def sweep(record: dict) -> tuple[str, list[dict]]:
    """The results of the shapes that differ only in L (N = L for triangles), largest such group; and its title."""
    groups = defaultdict(list)
    for result in record["results"]:
        case = result["case"]
        if result["mode"] != "eager" or case["q_len"] != case["k_len"]:
            continue
        square = case["rows"] == case["q_len"]
        rows = None if square else (case["batch"], case["rows"])
        groups[rows, case["heads"], case["head_dim"], case["pair"], case["dtype"]].append(result)
    if not groups:
        return "nothing to plot", []

    def lengths(key):
        return len({result["case"]["q_len"] for result in groups[key]})

    best = max(groups, key=lengths)
    rows, heads, head_dim, _, dtype = best
    kind = "triangle attention, N = L" if rows is None else f"B = {rows[0]}, N = {rows[1]}"
    return f"{kind}, {heads} heads, head dim {head_dim}, {dtype}", groups[best]


def points(results: list[dict], name: str, panel: str) -> list[tuple[int, float]]:
    """(L, value) of one line, sorted; a case without a figure is left out."""
    line = {}
    for result in results:
        if result["implementation"] != name or result["status"] != "ok":
            continue
        length = result["case"]["q_len"]
        if panel == "memory" and result["which"] == "fwd+bwd" and result["extra_mib"] is not None:
            line[length] = result["extra_mib"]
        elif panel == result["which"]:
            line[length] = result["timing"]["median"]
    return sorted(line.items())


def draw(record: dict, path: Path) -> None:
    """Writes the picture; the format follows the file's suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    title, results = sweep(record)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(15, 4.6), layout="constrained")
    for axis, (panel, label) in zip(axes, PANELS.items(), strict=True):
        for name in implementations(record):
            line = points(results, name, panel)
            if not line:
                continue
            ours = name in record["ours"]
            style = {"linewidth": 2.5, "zorder": 3} if ours else {"linewidth": 1.2}
            axis.plot(*zip(*line, strict=True), marker="o", label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="L", title=label)
        ticks = sorted({result["case"]["q_len"] for result in results})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    if axes[0].lines:
        axes[0].legend(fontsize="small")
    figure.suptitle(f"{title}\n{machine_line(record['machine'])}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)

# SPDX-License-Identifier: Apache-2.0
"""The terminal table, out of a record: one line per shape and pass, one column per implementation."""


def key_of(result: dict) -> tuple[str, str, str, str]:
    """Line of the table that a result belongs to: shape, dtype, pass, mode."""
    return result["case"]["name"], result["case"]["dtype"], result["which"], result["mode"]


def by_line(record: dict) -> dict[tuple, dict[str, dict]]:
    """line -> implementation -> result, in the order of the record."""
    lines: dict[tuple, dict[str, dict]] = {}
    for result in record["results"]:
        lines.setdefault(key_of(result), {})[result["implementation"]] = result
    return lines


def implementations(record: dict) -> list[str]:
    """Columns: ours first, then the peers, in the order of the record."""
    names = dict.fromkeys([*record["ours"], *(result["implementation"] for result in record["results"])])
    return list(names)


def milliseconds(value: float) -> str:
    """Three significant digits."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def cell(result: dict | None, baseline: dict | None) -> str:
    """Milliseconds, and for a peer how many times ours it takes; or why there is no time."""
    if result is None:
        return "-"
    if result["status"] != "ok":
        return result["status"]
    text = milliseconds(result["timing"]["median"])
    if baseline is None or baseline is result or baseline["status"] != "ok":
        return text
    return f"{text} ({result['timing']['median'] / baseline['timing']['median']:.2f}x)"


def spread_of(result: dict) -> str:
    """Half of the distance between the 10th and the 90th percentile, relative to the median."""
    timing = result["timing"]
    return f"{50 * (timing['high'] - timing['low']) / timing['median']:.0f}%"


def aligned(rows: list[list[str]]) -> str:
    """Rows of equal length as columns, the first row underlined."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def render(record: dict) -> str:
    """Times for a terminal; peers' ratios are to our first column, as are TFLOP/s and spread."""
    names = implementations(record)
    first = record["ours"][0] if record["ours"] else None
    rows = [["shape", "dtype", "pass", *(f"{name} ms" for name in names), "TFLOP/s", "spread"]]
    for (shape, dtype, which, mode), results in by_line(record).items():
        baseline = results.get(first)
        timed = baseline is not None and baseline["status"] == "ok"
        label = which + (" graph" if mode == "graph" else "")
        times = [cell(results.get(name), baseline) for name in names]
        speed = f"{baseline['tflops']:.3g}" if timed and baseline["tflops"] is not None else "-"
        about_ours = [speed, spread_of(baseline) if timed else "-"]
        rows.append([shape, dtype, label, *times, *about_ours])
    return aligned(rows)


def render_memory(record: dict) -> str | None:
    """Peak MiB above the inputs for a terminal; None if it was not measured."""
    if all(result["extra_mib"] is None for result in record["results"]):
        return None
    names = implementations(record)
    rows = [["shape", "dtype", "pass", *(f"{name} MiB" for name in names)]]
    for (shape, dtype, which, mode), results in by_line(record).items():
        if mode == "eager":
            rows.append([shape, dtype, which, *(memory_cell(results.get(name)) for name in names)])
    return aligned(rows)


def memory_cell(result: dict | None) -> str:
    if result is None:
        return "-"
    if result["status"] != "ok":
        return result["status"]
    return "-" if result["extra_mib"] is None else f"{result['extra_mib']:.0f}"


def reasons(record: dict) -> list[str]:
    """One line for every implementation and reason that kept it from being timed."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for result in record["results"]:
        if result["status"] != "ok":
            where = f"{result['case']['name']} {result['which']}" + (" graph" if result["mode"] == "graph" else "")
            seen.setdefault((result["implementation"], result["status"], result["reason"]), []).append(where)
    lines = []
    for (name, status, reason), places in seen.items():
        asked = sum(result["implementation"] == name for result in record["results"])
        where = "everywhere" if len(places) == asked else ", ".join(places)
        lines.append(f"{name}: {status}, {where}" + (f": {reason}" if reason else ""))
    return lines

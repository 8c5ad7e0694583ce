# SPDX-License-Identifier: Apache-2.0
"""The JSON record of a run: on what, with which code, by which command, and every figure."""

import datetime
import json
import os
import platform
import shlex
import subprocess
from pathlib import Path

import torch

from tests.benchmarks.measure import Result, Settings

FORMAT = 1


def _output_of(*command: str) -> str | None:
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip() or None


def commit() -> str:
    """DS4SCI_COMMIT where the code travels without its history; else git's, with "+" when the tree has changes."""
    named = os.environ.get("DS4SCI_COMMIT")
    if named:
        return named
    root = Path(__file__).resolve().parents[2]
    head = _output_of("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changed = _output_of("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return head + ("+" if changed else "")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def machine(device: torch.device, arguments: list[str], module: str = "tests.benchmarks") -> dict[str, str]:
    """Everything that a figure depends on, as strings; `module` is the program that was run."""
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", module, *arguments]),
    }
    if device.type == "cuda":
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
        return {
            "device": torch.cuda.get_device_name(device),
            "driver": (driver or "unknown").splitlines()[0],
            "cuda": torch.version.cuda or "none",
            **about,
        }
    return {"device": f"{cpu_name()}, {torch.get_num_threads()} threads", "driver": "-", "cuda": "-", **about}


def machine_line(about: dict[str, str]) -> str:
    cuda = "" if about["cuda"] == "-" else f" | driver {about['driver']} | CUDA {about['cuda']}"
    return f"{about['device']}{cuda} | torch {about['torch']} | commit {about['commit']} | {about['date']}"


def as_record(about: dict[str, str], settings: Settings, ours: list[str], results: list[Result]) -> dict:
    """`ours`: names of this project's columns; ratios are taken to the first."""
    return {
        "format": FORMAT,
        "machine": about,
        "settings": {"min_ms": settings.min_ms, "l2_flushed": about["cuda"] != "-"},
        "ours": ours,
        "results": [result.as_json() for result in results],
    }


def _lines(items: list[dict]) -> str:
    return "[\n  " + ",\n  ".join(json.dumps(item) for item in items) + "\n ]" if items else "[]"


def write(path: Path, record: dict) -> None:
    """One line per case and per result; results name their case by its index.

    Whole or not at all, so that a run that is cut off leaves the last complete record.
    """
    cases: list[dict] = []
    results = []
    for result in record["results"]:
        if result["case"] not in cases:
            cases.append(result["case"])
        results.append({**result, "case": cases.index(result["case"])})
    head = [f' "{key}": {json.dumps(record[key])}' for key in ("format", "machine", "settings", "ours")]
    text = ",\n".join([*head, f' "cases": {_lines(cases)}', f' "results": {_lines(results)}'])
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text("{\n" + text + "\n}\n")
    scratch.replace(path)


def read(path: Path) -> dict:
    """A record as `as_record` makes it; ValueError for another format."""
    record = json.loads(path.read_text())
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} must be a record of format {FORMAT}, got {record.get('format')}")
    cases = record.pop("cases")
    record["results"] = [{**result, "case": cases[result["case"]]} for result in record["results"]]
    return record

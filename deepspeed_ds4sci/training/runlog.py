# SPDX-License-Identifier: Apache-2.0
"""A run's log, one JSON object per line."""

import json
from pathlib import Path


class RunLog:
    """Appends records, each with its `step`, to a JSONL file. A resumed run drops what was logged after its
    checkpoint."""

    def __init__(self, path: Path, resumed_step: int = 0):
        self.path = path
        kept = [record for record in read_log(path) if record["step"] <= resumed_step] if resumed_step else []
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def append(self, record: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict]:
    """Records in order; [] where there is no file. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    means = []
    for i in range(len(values)):
        part = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(part) / len(part))
    return means

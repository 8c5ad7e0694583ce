# SPDX-License-Identifier: Apache-2.0
"""The table of explicit masks runs where there is no GPU, and says what it cannot measure there."""

import json

from tests.benchmarks import explicit_mask


def test_both_sides_of_the_threshold(tmp_path, capsys):
    path = tmp_path / "masks.json"
    arguments = ["--device", "cpu", "--lengths", "32", "48", "--hidden", "64", "--min-ms", "1", "--json", str(path)]
    assert explicit_mask.main([*arguments, "--implementation", "math"]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["tokens"], row["built"]) for row in rows] == [
        (32, "device"),
        (32, "CPU"),
        (48, "device"),
        (48, "CPU"),
    ]
    assert all(row["build ms"] > 0 and row["step ms"] > row["build ms"] and row["step MiB"] is None for row in rows)
    assert "build MiB" in capsys.readouterr().out

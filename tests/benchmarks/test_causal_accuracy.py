# SPDX-License-Identifier: Apache-2.0
"""The accuracy of causal attention at long lengths, on short sequences and the CPU."""

import json

import pytest
import torch

from tests.benchmarks import causal_accuracy, tables
from tests.benchmarks.causal_accuracy import TENSORS, computed, definition, difference, errors, main
from tests.benchmarks.record import machine


def test_the_definition_in_blocks_is_that_of_autograd():
    torch.manual_seed(0)
    packed, do = torch.randn(1, 50, 3, 8, dtype=torch.float64), torch.randn(1, 50, 1, 8, dtype=torch.float64)
    expected = computed("math", packed, do)
    actual = definition(*packed[0].unbind(1), do[0, :, 0], torch.float64, block_rows=16)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, 0], rtol=1e-12, atol=1e-12)
    rounded = definition(*packed[0].unbind(1), do[0, :, 0], torch.bfloat16, block_rows=16)
    assert all(x.dtype == torch.bfloat16 for x in rounded)
    assert all(0 < errors(x, y)["rms"] < 0.03 for x, y in zip(rounded, actual, strict=True))


def test_eager_errs_as_much_in_any_blocks():
    """Else the bar would be the lower, the longer the sequence: 512 rows of 65,536 are one of 128 blocks."""
    torch.manual_seed(0)
    inputs = torch.randn(4, 1024, 16, dtype=torch.bfloat16).unbind()
    exact = definition(*inputs, torch.float64)
    whole, blocks = (definition(*inputs, torch.bfloat16, block_rows=rows) for rows in (1024, 8))
    for a, b, reference in zip(whole, blocks, exact, strict=True):
        assert errors(b, reference)["rms"] == pytest.approx(errors(a, reference)["rms"], rel=0.01)


def test_errors_and_differences_are_relative():
    reference = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    assert errors(reference * 1.5, reference) == {"rms": 0.5, "max": pytest.approx(2 / 12.5**0.5)}
    assert difference(torch.ones(2, 3, 4) * 3, torch.ones(2, 3, 4) * 2) == 0.5


def test_the_record_and_its_table(tmp_path, capsys):
    record = tmp_path / "record.json"
    arguments = ["--lengths", "70", "--head-dims", "8,12", "--width", "24", "--json", str(record)]
    assert main([*arguments, "--implementations", "math,cudnn,flash"]) == 0
    rows = json.loads(record.read_text())["rows"]
    assert [(row["head_dim"], row["heads"]) for row in rows[::3]] == [(8, 3), (12, 2)]
    for row in rows:
        if row["implementation"] == "cudnn" and not torch.cuda.is_available():
            assert "needs a CUDA GPU" in row["failed"]
        elif "failed" not in row:
            assert row["finite"] and all(row["errors"][name]["rms"] < 1e-2 for name in TENSORS)
            if row["implementation"] == "flash":
                assert row["difference"]["to"] == "math" and row["difference"]["dq"] < 1e-2
    table = capsys.readouterr().out
    assert "| 70, 3 x 8 | `math` |" in table and " to `math` |" in table
    (tmp_path / "long_sequence").mkdir()
    record.rename(tmp_path / "long_sequence" / "here.json")
    text = tables.updated("<!-- accuracy:here -->\nold\n<!-- /accuracy -->\n", tmp_path)
    assert "| 70, 3 x 8 | `math` |" in text and "old" not in text and text.endswith("<!-- /accuracy -->\n")


def test_the_version_of_a_package_is_recorded(monkeypatch):
    original = causal_accuracy.computed
    monkeypatch.setattr(causal_accuracy, "unavailable_reason", lambda *_: None)
    monkeypatch.setattr(causal_accuracy, "computed", lambda _, *inputs: original("math", *inputs))
    monkeypatch.setattr(causal_accuracy.importlib.metadata, "version", {"flash-attn-4": "4.1"}.get)
    rows = causal_accuracy.measure(40, 2, 8, ["math", "flash_attn_4"], torch.device("cpu"), torch.float32)
    assert [row.get("version") for row in rows] == [None, "4.1"]
    table = causal_accuracy.markdown_accuracy({"machine": machine(torch.device("cpu"), []), "rows": rows})
    assert "| `math` |" in table and "| `flash_attn_4` 4.1 |" in table


def test_a_name_that_does_not_exist(capsys):
    with pytest.raises(SystemExit):
        main(["--implementations", "fast"])
    assert "--implementations must be of" in capsys.readouterr().err


def test_what_is_wrong_is_seen(monkeypatch):
    original = causal_accuracy.computed

    def wrong(implementation, packed, do):
        o, dq, dk, dv = original("math", packed, do)
        return [o, dq * (1.5 if implementation == "flash" else 1), dk, dv]

    monkeypatch.setattr(causal_accuracy, "computed", wrong)
    right, other = causal_accuracy.measure(40, 2, 8, ["math", "flash"], torch.device("cpu"), torch.float32)
    assert right["errors"]["dq"]["rms"] < 1e-5 and other["errors"]["dq"]["rms"] == pytest.approx(0.5)
    assert other["difference"]["dq"] == pytest.approx(0.5) and other["difference"]["dk"] == 0

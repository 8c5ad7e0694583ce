# SPDX-License-Identifier: Apache-2.0
"""The run's log, one JSON object per line, and its plot."""

import json
from pathlib import Path


class RunLog:
    """Appends records to a JSONL file. A resumed run drops what was logged after its checkpoint."""

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


def plot_log(log_path: Path, plot_path: Path, title: str) -> None:
    """Training loss, and held-out accuracy of the model and of the column profile, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(log_path)
    train = [r for r in records if "loss" in r]
    held_out = [r for r in records if "held_out_model_accuracy" in r]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    steps = [r["step"] for r in train]
    left.plot(steps, [r["loss"] for r in train], color="0.8", label="each step")
    left.plot(steps, _running_mean([r["loss"] for r in train], 20), color="C0", label="mean of 20 steps")
    if held_out:
        at = [r["step"] for r in held_out]
        left.plot(at, [r["held_out_model_nll"] for r in held_out], "C1o-", label="held out")
        left.axhline(held_out[-1]["held_out_profile_nll"], color="C3", ls="--", label="held out, column profile")
        right.plot(at, [r["held_out_model_accuracy"] for r in held_out], "C1o-", label="Evoformer")
        right.axhline(held_out[-1]["held_out_profile_accuracy"], color="C3", ls="--", label="column profile")
        right.legend()
    left.set(xlabel="step", ylabel="cross entropy of hidden residues (nats)", title="Loss")
    left.legend()
    right.set(xlabel="step", ylabel="fraction right", title="Hidden residues of held-out sequences")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(plot_path, dpi=120)
    pyplot.close(figure)


def _running_mean(values: list[float], window: int) -> list[float]:
    means = []
    for i in range(len(values)):
        part = values[max(0, i + 1 - window) : i + 1]
        means.append(sum(part) / len(part))
    return means

# SPDX-License-Identifier: Apache-2.0
"""The plot of a run."""

from pathlib import Path

from deepspeed_ds4sci.training import read_log, running_mean


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
    left.plot(steps, running_mean([r["loss"] for r in train], 20), color="C0", label="mean of 20 steps")
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

# SPDX-License-Identifier: Apache-2.0
"""The plots of a run: loss and perplexity, and the embeddings of the genomes."""

from pathlib import Path

import numpy as np

from deepspeed_ds4sci.training import read_log, running_mean


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_log(log_path: Path, plot_path: Path, title: str) -> None:
    """Loss, and perplexity, of training and of the held-out windows against the step, beside the Markov models."""
    pyplot = _pyplot()
    records = read_log(log_path)
    held_out = [r for r in records if "held_out_model" in r]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, shown in zip(axes, (np.asarray, np.exp), strict=True):
        losses = [r["loss"] for r in records]
        steps = [r["step"] for r in records]
        axis.plot(steps, shown(losses), color="0.8", label="each step")
        axis.plot(steps, shown(running_mean(losses, 20)), color="C0", label="mean of 20 steps")
        if held_out:
            at = [r["step"] for r in held_out]
            axis.plot(at, shown([r["held_out_model"] for r in held_out]), "C1o-", label="held out")
            for name, colour in (("markov", "C3"), ("frequencies", "C4")):
                label = {"markov": "order-2 Markov", "frequencies": "token frequencies"}[name]
                axis.axhline(shown(held_out[-1][f"held_out_{name}"]), color=colour, ls="--", label=label)
        axis.set(xlabel="step")
    axes[0].set(ylabel="cross entropy (nats per token)", title="Loss")
    axes[1].set(ylabel="perplexity per token", title="Perplexity")
    axes[0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    figure.savefig(plot_path, dpi=120)
    pyplot.close(figure)


def plot_embeddings(embeddings: dict[str, np.ndarray], plot_path: Path, title: str) -> None:
    """The first two principal components of the windows, coloured by genome, and each whole genome as a star."""
    pyplot = _pyplot()
    windows, owner = embeddings["windows"], embeddings["genome_of_window"]
    mean = windows.mean(axis=0)
    _, _, axes = np.linalg.svd(windows - mean, full_matrices=False)
    figure, axis = pyplot.subplots(figsize=(6.5, 5))
    for number, name in enumerate(embeddings["names"]):
        at = (windows[owner == number] - mean) @ axes[:2].T
        whole = (embeddings["genomes"][number] - mean) @ axes[:2].T
        (points,) = axis.plot(*at.T, ".", alpha=0.5, label=f"{name}, {len(at)} windows")
        axis.plot(*whole, "*", ms=16, mec="black", color=points.get_color())
    axis.set(xlabel="first principal component", ylabel="second principal component")
    axis.set_title(title, fontsize="medium")
    axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(plot_path, dpi=120)
    pyplot.close(figure)

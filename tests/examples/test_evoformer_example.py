# SPDX-License-Identifier: Apache-2.0
"""The Evoformer example: its parts in one process, and short runs of two CPU ranks under the launcher."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepspeed_ds4sci.data import HeldOutExamples, column_profile, read_alignment
from deepspeed_ds4sci.data.alphabet import AMINO_ACIDS
from deepspeed_ds4sci.data.masked_msa import IGNORE
from deepspeed_ds4sci.training import RunLog

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "evoformer"
CPU_CONFIG = ROOT / "configs" / "evoformer_cpu_zero2_offload.json"
TINY = {"--steps": 24, "--eval-every": 24, "--n-seq": 12, "--n-res": 12, "--blocks": 1, "--c-m": 16, "--c-z": 8}
MODULES = ("model", "evaluation", "plots", "train")


@pytest.fixture(scope="module")
def example():
    """The example's modules, which import each other by bare names as scripts do."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        modules = {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(EXAMPLE))
        for name in MODULES:
            sys.modules.pop(name, None)
    return SimpleNamespace(**modules)


def family(n_seq=30, n_col=24, seed=0):
    """Copies of one sequence with three residues in ten replaced: the column profile is right about as often."""
    rng = np.random.default_rng(seed)
    tokens = np.tile(rng.integers(0, 20, n_col), (n_seq, 1))
    change = rng.random(tokens.shape) < 0.3
    return np.where(change, rng.integers(0, 20, tokens.shape), tokens).astype(np.uint8)


@pytest.fixture(scope="module")
def alignment(tmp_path_factory):
    path = tmp_path_factory.mktemp("family") / "family.fasta"
    rows = ["".join(AMINO_ACIDS[t] for t in row) for row in family()]
    path.write_text("".join(f">s{i}\n{row}\n" for i, row in enumerate(rows)))
    return path


def test_the_shipped_alignment_reads():
    found = read_alignment(EXAMPLE / "data" / "secy.sto").drop_gappy_columns(0.5)
    assert found.tokens.shape == (158, 349)


def test_model_shapes_and_loss(example):
    config = example.model.ModelConfig(num_blocks=1, c_m=16, c_z=8)
    model = example.model.MaskedMSAModel(config)
    shown = torch.randint(0, 23, (2, 5, 7))
    columns = torch.arange(7).expand(2, 7) + torch.tensor([[0], [90]])
    logits = model(shown, columns)
    assert logits.shape == (2, 5, 7, 20)
    target = torch.full((2, 5, 7), IGNORE)
    target[0, 1, 2], target[1, 4, 6] = 3, 11
    loss, accuracy = example.model.masked_loss(logits, target)
    expected = -(logits[0, 1, 2].log_softmax(0)[3] + logits[1, 4, 6].log_softmax(0)[11]) / 2
    torch.testing.assert_close(loss, expected)
    right = [logits[0, 1, 2].argmax() == 3, logits[1, 4, 6].argmax() == 11]
    assert accuracy.item() == sum(right) / 2
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_model_does_not_depend_on_the_position_of_a_crop(example):
    model = example.model.MaskedMSAModel(example.model.ModelConfig(num_blocks=1, c_m=16, c_z=8)).eval()
    shown = torch.randint(0, 23, (1, 5, 7))
    columns = torch.arange(7)[None]
    assert torch.equal(model(shown, columns), model(shown, columns + 40))


class Oracle(torch.nn.Module):
    """Predicts what `right` says it may, from a table of the truth."""

    def __init__(self, truth, right):
        super().__init__()
        self.truth, self.right = truth, right

    def forward(self, shown, columns):
        assert not self.training
        logits = torch.zeros(*shown.shape, 20)
        for b in range(len(shown)):
            row = self.truth[tuple(shown[b, 1:].flatten().tolist()), tuple(columns[b].tolist())]
            logits[b, 0] = torch.nn.functional.one_hot(row if self.right else (row + 1) % 20, 20) * 10.0
        return logits


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("right", [True, False])
def test_evaluation_scores_model_and_profile_on_the_same_positions(example, monkeypatch, world_size, right):
    tokens = family()
    train, held_out = np.arange(1, 30), np.array([0])
    examples = HeldOutExamples(tokens, train, held_out, n_seq=9, n_res=10, rate=0.5, repeats=2)
    truth = {}
    hits, positions = 0, 0
    profile = column_profile(tokens[train])
    for item in examples:
        columns = item["columns"].numpy()
        key = tuple(item["shown"][1:].flatten().tolist()), tuple(columns.tolist())
        truth[key] = torch.from_numpy(tokens[0, columns].astype(np.int64))
        hidden = (item["target"][0] != IGNORE).numpy()
        hits += (profile[columns].argmax(-1) == tokens[0, columns])[hidden].sum()
        positions += hidden.sum()
    totals = []
    monkeypatch.setattr(example.evaluation.dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(example.evaluation.dist, "all_reduce", totals.append)
    model = Oracle(truth, right).train()
    for rank in range(world_size):
        monkeypatch.setattr(example.evaluation.dist, "get_rank", lambda rank=rank: rank)
        # The result of one rank is its own share: only the sum of the totals means something.
        try:
            example.evaluation.evaluate(model, examples, 2, torch.device("cpu"))
        except ValueError:
            assert totals[-1][-1] == 0
    assert model.training
    model_right, profile_right, model_nll, profile_nll, count = sum(totals).tolist()
    assert count == positions and profile_right == hits
    assert model_right == (positions if right else 0)
    assert (model_nll < profile_nll) == right


def test_plot_is_written_with_and_without_held_out_results(example, tmp_path):
    pytest.importorskip("matplotlib")
    result = example.evaluation.HeldOutResult(0.5, 0.4, 1.5, 1.8, 100)
    log = RunLog(tmp_path / "log.jsonl")
    for step in range(1, 30):
        log.append({"step": step, "loss": 3.0 / step} | (result.to_record() if step == 29 else {}))
        if step in (1, 29):
            example.plots.plot_log(tmp_path / "log.jsonl", tmp_path / f"{step}.png", "title")
    for step in (1, 29):
        assert (tmp_path / f"{step}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "the following arguments are required: --config"),
        (["--config", "c", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["--config", "c", "--stop-after", "0"], "--stop-after must be at least 1, got 0"),
        (["--config", "c", "--eval-every", "0"], "--eval-every must be at least 1, got 0"),
        (["--config", "c", "--masking", "all"], "invalid choice: 'all'"),
    ],
)
def test_wrong_options_are_named(example, capsys, options, message):
    with pytest.raises(SystemExit):
        example.train.parse_arguments(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["1", "0", "-5", "08", "many"])
def test_a_demo_too_short_to_be_cut_off_is_refused(tmp_path, steps):
    environment = {"PATH": os.environ["PATH"], "DS4SCI_DEMO_STEPS": steps, "DS4SCI_DEMO_OUTPUT": str(tmp_path / "run")}
    done = subprocess.run(["bash", EXAMPLE / "demo.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "run").exists()
    assert "DS4SCI_DEMO_STEPS must be a whole number from 2 on" in done.stderr and f"got {steps}" in done.stderr


def launch(alignment, output, *options):
    """Two CPU ranks under the launcher, a tiny model; returns (exit status, output, log records)."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("deepspeed"), "--quiet", "--num_gpus", 2, "--master_port", port]
    command += [EXAMPLE / "train.py", "--config", CPU_CONFIG, "--alignment", alignment, "--output", output]
    command += [part for option in TINY.items() for part in option] + [*options, "--max-identity", "0.95"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=600
    )
    log = output / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.returncode, done.stdout + done.stderr, records


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_a_run_writes_its_files_learns_and_resumes_identically(alignment, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    # So short a run cannot beat the profile, which must show in the exit status.
    status, text, records = launch(alignment, whole, "--require-beat-profile", "--checkpoint-every", 15)
    assert status != 0, text
    assert "held-out masked accuracy: Evoformer 0." in text and "does not beat the profile" in text
    assert [r["step"] for r in records] == list(range(1, 25))
    losses = [r["loss"] for r in records]
    assert np.isfinite(losses).all() and np.mean(losses[-6:]) < np.mean(losses[:6]) - 0.05, losses
    assert all(r["tokens_per_second"] > 0 for r in records)
    assert records[-1]["held_out_positions"] > 0 and 0 <= records[-1]["held_out_model_accuracy"] <= 1
    assert "tokens/s, peak memory" in text and "24/24" in text
    assert (whole / "plot.png").stat().st_size > 1000 and (whole / "checkpoints" / "step24").is_dir()

    # As if the run had died between the checkpoint of step 15 and that of step 24.
    shutil.copytree(whole, again)
    (again / "checkpoints" / "latest").write_text("step15")
    status, text, resumed = launch(alignment, again, "--resume", "--stop-after", 20)
    assert status == 0 and "from step 15" in text, text
    assert (
        "stopped after step 20 of 24; --resume goes on from there" in text
        and "held-out" not in text.split("step 15")[1]
    )

    def without_timing(log):
        return [{name: value for name, value in r.items() if name != "tokens_per_second"} for r in log]

    assert without_timing(resumed) == without_timing(records[:20])

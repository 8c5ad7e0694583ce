# SPDX-License-Identifier: Apache-2.0
"""The GenSLM example: scores, embeddings, plots, and a launched run that resumes as it would have gone on."""

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

from deepspeed_ds4sci.data.genomes import CODONS, GenomeDataConfig, GenomeDataset
from deepspeed_ds4sci.training import RunLog

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "genslm"
CPU_CONFIG = ROOT / "configs" / "genslm_cpu_zero2_sequence_parallel.json"
GENOMES = [EXAMPLE / "data" / name for name in ("NC_005816.gb.gz", "MN908947.3.fasta.gz")]
MODULES = ("model", "evaluation", "plots", "train")
DATA = GenomeDataConfig(context=64, sequences="genome", held_out_every=5, part="train")


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


class StandIn:
    """An engine of one rank around a function of the batch."""

    device = torch.device("cpu")
    mpu = None

    def __init__(self, function):
        self.function = function
        self.training = True

    def __call__(self, **arguments):
        assert not self.training and "labels" not in arguments
        return self.function(**arguments)

    def eval(self):
        self.training = False

    def train(self):
        self.training = True

    def train_micro_batch_size_per_gpu(self):
        return 3


def ranks(monkeypatch, example, world_size=1, rank=0, totals=None):
    monkeypatch.setattr(example.evaluation.dist, "get_world_size", lambda: world_size)
    monkeypatch.setattr(example.evaluation.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(example.evaluation.dist, "all_reduce", (totals if totals is not None else []).append)

    def gather(everyone, mine):
        everyone[:] = [mine] * world_size

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)


def uniform_logits(input_ids, **_):
    logits = torch.full((*input_ids.shape, 69), float("-inf"))
    logits[..., 5:] = 0.0
    return {"logits": logits}


@pytest.mark.parametrize("world_size", [1, 2])
def test_model_and_baselines_are_scored_on_the_same_codons(example, monkeypatch, world_size):
    held_out = example.evaluation.HeldOut(GENOMES, DATA)
    totals = []
    for rank in range(world_size):
        ranks(monkeypatch, example, world_size, rank, totals)
        engine = StandIn(uniform_logits)
        result = held_out.evaluate(engine)
        assert result.model == pytest.approx(np.log(64)) and engine.training
    windows = [window for i in range(2) for window in GenomeDataset(GENOMES, held_out.config).windows_of(i)]
    expected = sum(int((window.tokens[1:] >= 5).sum()) for window in windows)
    model, markov, frequencies, tokens = sum(totals).tolist()
    assert tokens == expected and model == pytest.approx(expected * np.log(64), rel=1e-6)
    # Real genomes are no uniform noise, and both baselines know it.
    assert markov / tokens < np.log(64) - 0.02 and frequencies / tokens < np.log(64) - 0.02


def test_a_model_that_knows_the_next_codon_beats_the_baselines(example, monkeypatch):
    def oracle(input_ids, **_):
        return {"logits": torch.nn.functional.one_hot(input_ids.roll(-1, 1), 69) * 20.0}

    ranks(monkeypatch, example)
    result = example.evaluation.HeldOut(GENOMES, DATA).evaluate(StandIn(oracle))
    assert result.model < 0.01 and result.beats_markov
    assert "beats the Markov model" in example.train.describe(result)
    record = result.to_record()
    assert record["held_out_perplexity"] == pytest.approx(np.exp(result.model))


def test_embeddings_are_means_over_tokens_and_tell_genomes_apart(example, monkeypatch):
    def hidden(input_ids, **_):
        return {"hidden_states": torch.nn.functional.one_hot(input_ids, 69).double()}

    ranks(monkeypatch, example)
    found = example.evaluation.embed_genomes(StandIn(hidden), GENOMES, DATA)
    assert found["names"].tolist() == ["NC_005816", "MN908947"]
    for number in range(2):
        windows = list(GenomeDataset(GENOMES, GenomeDataConfig(context=64, sequences="genome")).windows_of(number))
        assert (found["genome_of_window"] == number).sum() == len(windows)
        # Every token that is predicted counts once: all but a window's first.
        tokens = np.concatenate([window.tokens[1:][window.documents[1:] >= 0] for window in windows])
        counts = np.bincount(tokens, minlength=CODONS.vocab_size)
        assert found["genomes"][number] == pytest.approx(counts / counts.sum(), abs=1e-6)
    apart = {"windows": np.array([[0.0], [0.1], [5.0], [5.1]]), "genome_of_window": np.array([0, 0, 1, 1])}
    assert example.evaluation.separation(apart) == 1.0
    apart["genome_of_window"] = np.array([0, 1, 0, 1])
    assert example.evaluation.separation(apart) < 0.6


def test_plots_are_written_with_and_without_held_out_results(example, tmp_path):
    pytest.importorskip("matplotlib")
    result = example.evaluation.HeldOutResult(3.9, 4.0, 3.95, 100)
    log = RunLog(tmp_path / "log.jsonl")
    for step in range(1, 30):
        log.append({"step": step, "loss": 3.0 / step} | (result.to_record() if step == 29 else {}))
        if step in (1, 29):
            example.plots.plot_log(tmp_path / "log.jsonl", tmp_path / f"{step}.png", "title")
    rng = np.random.default_rng(0)
    embeddings = {
        "names": np.array(["a", "b"]),
        "genomes": rng.normal(size=(2, 8)),
        "windows": rng.normal(size=(20, 8)),
        "genome_of_window": np.repeat([0, 1], 10),
    }
    example.plots.plot_embeddings(embeddings, tmp_path / "embeddings.png", "title")
    for name in ("1", "29", "embeddings"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_model_sizes_follow_the_options(example):
    tiny = example.model.model_config("tiny", 512, 69, "alibi", 0.0)
    assert (tiny.max_positions, tiny.position_embedding, tiny.hidden_dropout) == (512, "alibi", 0.0)
    named = example.model.model_config("gpt-neox-25M", 512, 9)
    assert (named.max_positions, named.vocab_size, named.hidden_size) == (2048, 9, 512)
    assert example.model.model_config("gpt-neox-25M", 10240, 69).max_positions == 10240


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "the following arguments are required: --deepspeed_config"),
        (["--deepspeed_config", "c", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["--deepspeed_config", "c", "--stop-after", "0"], "--stop-after must be at least 1, got 0"),
        (["--deepspeed_config", "c", "--held-out-every", "1"], "--held-out-every must be at least 2, got 1"),
        (["--deepspeed_config", "c", "--model", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_wrong_options_are_named(example, capsys, options, message):
    with pytest.raises(SystemExit):
        example.train.parse_arguments(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["1", "0", "-5", "08", "many"])
def test_a_demo_too_short_to_be_cut_off_is_refused(tmp_path, steps):
    environment = {
        "PATH": os.environ["PATH"],
        "DS4SCI_DEMO_STEPS": steps,
        "DS4SCI_GENSLM_DEMO_OUTPUT": str(tmp_path / "run"),
    }
    done = subprocess.run(["bash", EXAMPLE / "demo.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "run").exists()
    assert "DS4SCI_DEMO_STEPS must be a whole number from 2 on" in done.stderr and f"got {steps}" in done.stderr


def launch(output, *options):
    """Two CPU ranks under the launcher that share each sequence; returns (exit status, output, log records)."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("deepspeed"), "--quiet", "--num_gpus", 2, "--master_port", port]
    command += [EXAMPLE / "train.py", "--deepspeed_config", CPU_CONFIG, "--output", output, "--genomes", *GENOMES]
    command += ["--steps", 8, "--eval-every", 8, "--checkpoint-every", 5, "--context", 62, "--shuffle", 16, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, timeout=600
    )
    log = output / "log.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.returncode, done.stdout + done.stderr, records


@pytest.mark.slow
@pytest.mark.distributed(2)
def test_a_run_writes_its_files_and_resumes_identically(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    # So short a run cannot beat the Markov model, which must show in the exit status.
    status, text, records = launch(whole, "--require-beat-markov")
    assert status != 0, text
    assert "does not beat the Markov model" in text and "2 rank(s) on cpu, 2 per sequence" in text
    assert "ds4sci.attention_mask: 2 GenSLMLayer modules attend under an explicit document mask" in text
    assert [r["step"] for r in records] == list(range(1, 9))
    assert all(np.isfinite(r["loss"]) and r["perplexity"] == pytest.approx(np.exp(r["loss"])) for r in records)
    last = records[-1]
    assert last["held_out_tokens"] > 0 and last["tokens_per_second"] > 0 and 0 < last["mfu"] < 1
    assert 0 < last["tflops_per_device"] < last["method_tflops_per_device"]
    assert "MFU" in text and "GiB on the host" in text and "nearest to their own genome" in text
    for name in ("plot.png", "embeddings.png", "embeddings.npz"):
        assert (whole / name).stat().st_size > 1000
    assert (whole / "checkpoints" / "step8").is_dir() and list((whole / "tensorboard").iterdir())

    # As if the run had died between the checkpoint of step 5 and that of step 8.
    shutil.copytree(whole, again)
    (again / "checkpoints" / "latest").write_text("step5")
    status, text, resumed = launch(again, "--resume")
    assert status == 0 and "from step 5" in text, text

    def results(log):
        return [
            {name: value for name, value in r.items() if "second" not in name and "flops" not in name} for r in log
        ]

    for record in (*records, *resumed):
        record.pop("mfu", None)
    assert results(resumed) == results(records)

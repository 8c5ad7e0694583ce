# SPDX-License-Identifier: Apache-2.0
"""Train short, infer long: ALiBi and rotary positions trained at 2K tokens on one genome, perplexity at up to 32K.

    python -m tests.benchmarks.train_short_infer_long --genome E_coli.fa.gz --json out.json --plot out.png
    python -m tests.benchmarks.train_short_infer_long --tiny

The tokens are the codons of the genome's coding sequences in order along it. A contiguous tenth at the end is held
out, cut to a multiple of the longest length, so that every length is scored on the same tokens. Rotary positions are
trained unscaled and evaluated as they are and scaled (linear, NTK, YaRN) by the length over that of training; ALiBi
has nothing to set. Training runs through a DeepSpeed engine on one device; nothing but the positions differs.

Where there is no pyrodigal, tokens made elsewhere do: --save-tokens FILE.npy there, --genome FILE.npy here.
"""

import argparse
import math
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from deepspeed_ds4sci.data.genomes import CODONS
from deepspeed_ds4sci.data.genomes.documents import token_pieces
from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.sequence.rotary import RotaryScaling
from tests.benchmarks.long_sequence import report
from tests.benchmarks.record import machine_line
from tests.benchmarks.table import aligned

MODULE = "tests.benchmarks.train_short_infer_long"
ROOT = Path(__file__).resolve().parents[2]
LAMBDA = ROOT / "examples" / "genslm" / "data" / "lambda_virus.fa.gz"
SCALINGS = ("none", "linear", "ntk", "yarn")
LOSS_TILE = 4096  # tokens


def load_tokens(path: Path, sequences: str) -> np.ndarray:
    """uint8: all coding sequences (or records) in order, each with [CLS] and [SEP]; or what --save-tokens wrote."""
    if path.suffix == ".npy":
        return np.load(path)
    return np.concatenate([piece.tokens for piece in token_pieces(path, CODONS, sequences)])


def split(tokens: np.ndarray, fraction: float, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(training part, held-out part, whose length is a multiple of `longest`).

    Raises:
        ValueError: the held-out part would be shorter than `longest`.
    """
    held = int(len(tokens) * fraction) // longest * longest
    if not held:
        raise ValueError(
            f"{fraction:.0%} of {len(tokens)} tokens must be at least the longest length = {longest}, got "
            f"{int(len(tokens) * fraction)}; take a larger genome, or a larger --held-out"
        )
    return tokens[:-held], tokens[-held:]


def train(config: GenSLMConfig, tokens: np.ndarray, options) -> tuple[GenSLM, list[float]]:
    """A model trained on random stretches of options.length tokens, and its losses in nats."""
    import deepspeed

    torch.manual_seed(options.seed)
    ds_config = {
        "train_micro_batch_size_per_gpu": options.batch,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": options.lr, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": options.steps, "warmup_num_steps": max(2, options.steps // 10)},
        },
    }
    if options.device.type == "cuda":
        ds_config["bf16"] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=GenSLM(config), config=ds_config)
    rng = np.random.default_rng(options.seed)
    losses = []
    for _ in range(options.steps):
        starts = rng.integers(0, len(tokens) - options.length, options.batch)
        rows = np.stack([tokens[start : start + options.length] for start in starts]).astype(np.int64)
        batch = torch.from_numpy(rows).to(options.device)
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return engine.module, losses


@torch.no_grad()
def perplexity(model: GenSLM, tokens: np.ndarray, length: int, device) -> float:
    """exp of the mean negative log likelihood over windows of `length` tokens, each read from its start."""
    model.eval()
    model.loss_tile = LOSS_TILE
    total = count = 0.0
    for window in tokens.reshape(-1, length).astype(np.int64):
        batch = torch.from_numpy(window)[None].to(device)
        output = model(batch, batch)
        total, count = total + float(output.loss_sum), count + float(output.num_tokens)
    return math.exp(total / count)


def scaled(model: GenSLM, kind: str, factor: float, length: int) -> GenSLM:
    """The model with its rotary angles scaled. Angles have no weights, so the rest is shared."""
    if kind == "none" or factor == 1:
        return model
    config = replace(model.config, rotary_scaling=RotaryScaling(kind, factor, original_length=length))
    with torch.device("meta"):
        other = GenSLM(config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def evaluate(kind: str, model: GenSLM, held_out: np.ndarray, options) -> list[dict]:
    """A line of perplexities per scaling."""
    lines = []
    for scaling in SCALINGS if kind == "rotary" else ("none",):
        points = []
        for length in options.lengths:
            ready = scaled(model, scaling, length / options.length, options.length)
            points.append([length, perplexity(ready, held_out, length, options.device)])
        name = kind if scaling == "none" else f"{kind}, {scaling}"
        print(f"  {name}: " + ", ".join(f"{length:,}: {value:.2f}" for length, value in points), flush=True)
        lines.append({"name": name, "perplexity": points})
    return lines


def draw(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for line in record["lines"]:
        axis.plot(*zip(*line["perplexity"], strict=True), "o-", label=line["name"])
    axis.axvline(record["length"], color="0.6", ls="--", label="trained at")
    found = [perplexity for line in record["lines"] for _, perplexity in line["perplexity"]]
    yscale = "log" if max(found) > 10 * min(found) else "linear"  # a logarithmic axis of less has no labelled tick
    axis.set(
        xscale="log", yscale=yscale, xlabel="tokens", ylabel="perplexity of held-out codons", title=record["title"]
    )
    axis.set_xticks(record["lengths"], [f"{length:,}" for length in record["lengths"]])
    axis.xaxis.minorticks_off()
    axis.legend(fontsize="small")
    figure.suptitle(machine_line(record["machine"]), fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--genome", type=Path, help="FASTA or GenBank, plain or gzip, of a million codons or so; or tokens, .npy")
    add("--sequences", default="genes", help="genome, annotated, called or genes; called ones need pyrodigal")
    add("--held-out", type=float, default=0.1, help="fraction of the tokens")
    add("--length", type=int, default=2048, help="tokens trained at")
    add("--lengths", default="2048,4096,8192,16384,32768", help="tokens evaluated at")
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=8)
    add("--steps", type=int, default=800)
    add("--batch", type=int, default=8, help="sequences per step")
    add("--lr", type=float, default=6e-4)
    add("--dropout", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--save-tokens", type=Path, help="write the tokens to this .npy file and stop")
    add("--json", type=Path)
    add("--plot", type=Path)
    add(
        "--tiny",
        action="store_true",
        help="rehearsal on a CPU: lambda's codons, 32 tokens, a model of 20,000 parameters",
    )
    options = parser.parse_args(argv)
    if options.tiny:
        options.genome, options.sequences = LAMBDA, "genome"
        options.length, options.lengths, options.held_out = 32, "32,64,128", 0.1
        options.hidden, options.layers, options.heads, options.steps, options.batch = 32, 1, 4, 30, 8
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if options.genome is None:
        parser.error("the following arguments are required: --genome (or --tiny)")
    options.lengths = sorted(int(length) for length in options.lengths.split(","))
    if any(options.lengths[-1] % length for length in options.lengths):
        parser.error(f"--lengths must divide the longest one = {options.lengths[-1]}, got {options.lengths}")
    return options


def start_alone(tiny: bool) -> torch.device:
    """A process group of this process, and its device."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from deepspeed_ds4sci.training import prepare_cpu

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(alone)
    prepare_cpu()
    deepspeed.init_distributed()
    return torch.device("cpu") if tiny else torch.device(get_accelerator().current_device_name())


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse_arguments(argv)
    tokens = load_tokens(options.genome, options.sequences)
    if options.save_tokens:
        np.save(options.save_tokens, tokens)
        print(f"{len(tokens):,} tokens in {options.save_tokens}")
        return 0
    tokens, held_out = split(tokens, options.held_out, options.lengths[-1])
    about = report.about(MODULE, argv)
    options.device = start_alone(options.tiny)
    record = {
        "machine": about,
        "title": f"{options.genome.name}: {len(tokens):,} training tokens, {len(held_out):,} held out",
        "length": options.length,
        "lengths": options.lengths,
        "steps": options.steps,
        "lines": [],
        "losses": {},
    }
    for kind in ("alibi", "rotary"):
        config = GenSLMConfig(
            options.hidden,
            options.layers,
            options.heads,
            4 * options.hidden,
            options.length,
            position_embedding=kind,
            embedding_dropout=options.dropout,
            hidden_dropout=options.dropout,
        )
        began = time.perf_counter()
        model, losses = train(config, tokens, options)
        print(
            f"{kind}: loss {losses[0]:.3f} -> {losses[-1]:.3f} nats in {time.perf_counter() - began:.0f} s", flush=True
        )
        record["losses"][kind] = losses
        record["lines"] += evaluate(kind, model, held_out, options)
        if options.json:
            report.write(options.json, record)
    heads = ["positions", *(f"{length:,}" for length in options.lengths)]
    rows = [[line["name"], *(f"{value:.2f}" for _, value in line["perplexity"])] for line in record["lines"]]
    print(f"\n{machine_line(about)}\n{record['title']}; perplexity by length\n{aligned([heads, *rows])}")
    if options.plot:
        draw(record, options.plot)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

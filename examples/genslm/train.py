# SPDX-License-Identifier: Apache-2.0
"""Trains a GenSLM-style decoder on genomes. Start it with the `deepspeed` launcher.

    deepspeed train.py --deepspeed_config ../../configs/genslm_25M_bf16_zero1.json --model gpt-neox-25M --context 2048
    OMP_NUM_THREADS=1 deepspeed --num_gpus 2 train.py \\
        --deepspeed_config ../../configs/genslm_cpu_zero2_sequence_parallel.json

How sequences are split over GPUs, and how memory is saved, is said in the JSON alone. Everything random is a function
of the seed and the step, so a resumed run continues as the first one would have gone on.
"""

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import numpy as np
import torch
from evaluation import MODEL_ARGUMENTS, HeldOut, HeldOutResult, Ranks, embed_genomes, genome_name, separation
from model import SIZES, TINY, model_config
from plots import plot_embeddings, plot_log
from torch.utils.data import DataLoader
from tqdm import tqdm

from deepspeed_ds4sci.data.genomes import TOKENIZERS, GenomeDataConfig, GenomeDataset
from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.training import (
    RunLog,
    count_parameters,
    load_config,
    peak_flops,
    peak_memory,
    prepare_cpu,
    refresh_seconds,
    resume,
    seed_step,
    step_flops,
)

HERE = Path(__file__).resolve().parent
SHIPPED = [HERE / "data" / name for name in ("lambda_virus.fa.gz", "MN908947.3.fasta.gz", "NC_005816.gb.gz")]

# What a checkpoint depends on: resuming with another value would not continue the same run.
RUN_ARGUMENTS = ("steps", "seed", "model", "position_embedding", "dropout")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--local_rank", type=int, default=0, help="set by the launcher")
    add("--deepspeed_config", type=Path, required=True, help="DeepSpeed JSON config")
    add("--genomes", type=Path, nargs="+", default=SHIPPED, help="FASTA or GenBank files, plain or gzip")
    add("--sequences", default="genes", help="genome, annotated, called (by pyrodigal) or genes (one of those two)")
    add("--tokens", choices=TOKENIZERS, default="codon")
    add("--context", type=int, default=256, help="tokens per window")
    add("--reverse-strand", action="store_true", help="with --sequences genome: train on both strands")
    add("--held-out-every", type=int, default=6, help="every so manieth window of a genome is held out")
    add("--shuffle", type=int, default=4096, help="windows put into random order at a time")
    add("--model", choices=SIZES, default=TINY)
    add("--position-embedding", choices=("learned", "rotary", "alibi"), help="default: the model's own")
    add("--dropout", type=float, help="of embeddings and residual branches; default: the model's own")
    add("--output", type=Path, default=HERE / "runs" / "latest", help="folder for log, plots and checkpoints")
    add("--steps", type=int, default=200, help="optimizer steps of the whole run; sets the length of the schedule")
    add("--stop-after", type=int, help="end early, after this step, as an interrupted run would")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output")
    add("--eval-every", type=int, default=50, help="steps between evaluations on held-out windows")
    add("--checkpoint-every", type=int, default=100, help="steps between checkpoints; one is also written at the end")
    add("--seed", type=int, default=0)
    add(
        "--require-beat-markov",
        action="store_true",
        help="exit with 1 unless the model beats the order-2 Markov model",
    )
    args = parser.parse_args(argv)
    for name in ("steps", "stop_after", "eval_every", "checkpoint_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.held_out_every < 2:
        parser.error(f"--held-out-every must be at least 2, got {args.held_out_every}")
    return args


def data_config(args: argparse.Namespace) -> GenomeDataConfig:
    return GenomeDataConfig(
        context=args.context,
        tokens=args.tokens,
        sequences=args.sequences,
        reverse_strand=args.reverse_strand,
        held_out_every=args.held_out_every,
        part="train",
        shuffle=args.shuffle,
        seed=args.seed,
    )


class Speed:
    """Tokens and operations per second of training steps, without evaluation and checkpoints."""

    def __init__(self, engine, config: GenSLMConfig, context: int):
        self.sequences = engine.train_batch_size()
        self.tokens = self.sequences * context
        self.flops = {count: step_flops(config, context, count=count) for count in ("model", "method")}
        dtype = next(engine.module.parameters()).dtype
        self.peak = peak_flops(engine.device, dtype)
        self.seconds, self.steps = 0.0, 0

    def add(self, seconds: float) -> None:
        # The first step compiles, allocates and loads.
        if self.steps or self.seconds:
            self.seconds, self.steps = self.seconds + seconds, self.steps + 1
        else:
            self.seconds = 1e-9

    def rates(self) -> dict[str, float]:
        """Of all ranks together, except for those per device."""
        per_second = self.steps / self.seconds
        rank_sequences = per_second * self.sequences / dist.get_world_size()
        tflops = {count: rank_sequences * flops / 1e12 for count, flops in self.flops.items()}
        return {
            "tokens_per_second": per_second * self.tokens,
            "tflops_per_device": tflops["model"],
            "method_tflops_per_device": tflops["method"],
            "mfu": tflops["model"] * 1e12 / self.peak.per_second,
        }

    def describe(self) -> str:
        rates = self.rates()
        return (
            f"{rates['tokens_per_second']:,.0f} tokens/s; per device {rates['tflops_per_device']:.3g} TFLOP/s of the "
            f"model (causal attention, no recomputation), {100 * rates['mfu']:.1f} % MFU of "
            f"{self.peak.per_second / 1e12:.3g} TFLOP/s ({self.peak.source}); {rates['method_tflops_per_device']:.3g} "
            "TFLOP/s by the method's count (full attention, recomputation included)"
        )


def train_step(engine, batches, step: int, args: argparse.Namespace, data_rank: int) -> float:
    """One optimizer step. Returns the loss in nats, the mean over all ranks and micro-batches."""
    seed_step(args.seed, step, data_rank)
    total = torch.zeros((), device=engine.device)
    for _ in range(engine.gradient_accumulation_steps()):
        batch = next(batches)
        arguments = {name: batch[name].to(engine.device) for name in (*MODEL_ARGUMENTS, "labels")}
        loss = engine(**arguments).loss
        engine.backward(loss)
        engine.step()
        total += loss.detach() / engine.gradient_accumulation_steps()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def placement(ds_config: dict):
    """Where the model is made: under ZeRO-3 in parts over the ranks from the start, since it need not fit on one."""
    if ds_config.get("zero_optimization", {}).get("stage", 0) < 3:
        return nullcontext()
    return deepspeed.zero.Init(config_dict_or_path=ds_config)


def train(args: argparse.Namespace) -> HeldOutResult | None:
    """Runs the whole job; returns the last held-out result, None if the run was stopped before any."""
    rank = dist.get_rank()
    data = data_config(args)
    torch.manual_seed(args.seed)
    config = model_config(
        args.model, args.context, TOKENIZERS[args.tokens].vocab_size, args.position_embedding, args.dropout
    )
    ds_config = load_config(args.deepspeed_config, args.steps, args.output)
    with placement(ds_config):
        model = GenSLM(config)
    parameters = count_parameters(model)
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    ranks = Ranks.of(engine)
    dataset = GenomeDataset(args.genomes, data, rank=ranks.data_rank, size=ranks.data_size)
    run = {name: getattr(args, name) for name in RUN_ARGUMENTS}
    start = 0
    if args.resume:
        state = resume(engine, args.output, run)
        start = state["step"]
        dataset.load_state_dict(state["data"])
    stop = args.steps if args.stop_after is None else min(args.steps, args.stop_after)
    held_out = HeldOut(args.genomes, data)
    title = f"{args.model}, {parameters:,} parameters, {args.context} {args.tokens}s; " + ", ".join(
        genome_name(path) for path in args.genomes[:5]
    )
    log_path, checkpoints = args.output / "log.jsonl", args.output / "checkpoints"
    if rank == 0:
        args.output.mkdir(parents=True, exist_ok=True)
        log = RunLog(log_path, start)
        print(
            f"{title}\n{dist.get_world_size()} rank(s) on {engine.device}, {ranks.per_sequence} per sequence, "
            f"from step {start}"
        )
    speed = Speed(engine, config, args.context)
    batches = iter(DataLoader(dataset, batch_size=engine.train_micro_batch_size_per_gpu()))
    progress = tqdm(total=args.steps, initial=start, disable=rank != 0, unit="step", mininterval=refresh_seconds())
    result = None
    for done in range(start + 1, stop + 1):
        began = time.perf_counter()
        loss = train_step(engine, batches, done - 1, args, ranks.data_rank)
        speed.add(time.perf_counter() - began)
        record = {"step": done, "loss": loss, "perplexity": float(np.exp(loss)), "lr": engine.get_lr()[0]}
        if speed.steps:
            record |= speed.rates()
        if done % args.eval_every == 0 or done == args.steps:
            result = held_out.evaluate(engine)
            record |= result.to_record()
        if rank == 0:
            log.append(record)
            write_events(engine, record)
            progress.update()
            progress.set_postfix_str(f"loss {loss:.3f}, {record.get('tokens_per_second', 0):,.0f} tokens/s", False)
            if "held_out_model" in record:
                progress.write(f"step {done}: {describe(result)}")
        if done % args.checkpoint_every == 0 or done == stop:
            state = {"step": done, "run": run, "data": dataset.state_dict()}
            engine.save_checkpoint(str(checkpoints), f"step{done}", state)
    progress.close()
    if start == args.steps:  # resumed at the end: nothing left to train
        result = held_out.evaluate(engine)
    on_device, on_host = peak_memory(engine.device)
    embeddings = embed_genomes(engine, args.genomes, data) if stop == args.steps else None
    if rank == 0:
        plot_log(log_path, args.output / "plot.png", title)
        print(f"log {log_path}, plot {args.output / 'plot.png'}, checkpoints {checkpoints}")
        if speed.steps:
            print(speed.describe())
        print(f"peak memory per rank: {on_device:.2f} GiB on the device, {on_host:.2f} GiB on the host")
        if embeddings is not None:
            write_embeddings(args, embeddings, title)
        if stop < args.steps:
            print(f"stopped after step {stop} of {args.steps}; --resume goes on from there")
        if result is not None:
            print(f"held out: {describe(result)}")
    return result


def write_events(engine, record: dict) -> None:
    """The record to DeepSpeed's monitor: TensorBoard, or whatever the JSON switches on."""
    if engine.monitor.enabled:
        skipped = ("step", "loss", "lr")  # DeepSpeed writes loss and learning rate by itself
        events = [(f"GenSLM/{name}", value, record["step"]) for name, value in record.items() if name not in skipped]
        engine.monitor.write_events(events)


def write_embeddings(args: argparse.Namespace, embeddings: dict[str, np.ndarray], title: str) -> None:
    np.savez(args.output / "embeddings.npz", **embeddings)
    share = separation(embeddings)
    text = f"{share:.0%} of {len(embeddings['windows'])} windows are nearest to their own genome"
    plot_embeddings(embeddings, args.output / "embeddings.png", f"{title}\n{text}")
    print(f"embeddings {args.output / 'embeddings.npz'}: {text}")


def describe(result: HeldOutResult) -> str:
    verdict = "beats" if result.beats_markov else "does not beat"
    return (
        f"model {result.model:.4f} nats per token (perplexity {np.exp(result.model):.2f}), order-2 Markov model "
        f"{result.markov:.4f}, token frequencies {result.frequencies:.4f} on {result.tokens} tokens: {verdict} the "
        "Markov model"
    )


def main() -> int:
    args = parse_arguments()
    prepare_cpu()
    deepspeed.init_distributed()
    result = train(args)
    missed = args.require_beat_markov and result is not None and not result.beats_markov
    # Rank 0 alone reports a miss, and last: the launcher kills the other ranks as soon as one fails.
    status = int(missed and dist.get_rank() == 0)
    dist.barrier()
    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())

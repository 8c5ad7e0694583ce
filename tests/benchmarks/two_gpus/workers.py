# SPDX-License-Identifier: Apache-2.0
"""What the ranks run. Every function is called on all ranks of a launch and returns plain numbers."""

import json
import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist

from deepspeed_ds4sci.models import GenSLM
from tests.benchmarks.climb import Climb
from tests.benchmarks.two_gpus.sizes import Sizes
from tests.distributed.engine_worker import device

OUT_OF_MEMORY = 3
"""Exit code of a rank that ran out of memory: the others wait for it in a collective and have to be ended."""

ADAMW = {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1, "torch_adam": True}}

_BUCKET = 2**24


def engine_of(config, *, mode: str | None, bf16: bool, stage: int):
    """An engine over a new GenSLM, the same on every rank; mode None: this rank alone, without a `ds4sci` block."""
    import deepspeed

    import deepspeed_ds4sci  # noqa: F401 - the hooks, where the package is not installed

    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(dist.get_backend())
    torch.manual_seed(0)
    with torch.device(device()):
        model = GenSLM(config)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**6,
        "bf16": {"enabled": bf16},
        "optimizer": ADAMW,
        # DeepSpeed's own size, 5e8 elements, would take part of the memory that is measured.
        "zero_optimization": {"stage": stage, "reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET},
    }
    if mode is not None:
        ds_config["ds4sci"] = {
            "sequence_parallel": {"size": dist.get_world_size(), "mode": mode},
            "position_embedding": {"kind": "learned", "sharded": True},
        }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)[0]


def codons(num_tokens: int, vocabulary: int, seed: int) -> torch.Tensor:
    """[1, num_tokens] of a simulated source with something to learn: four tokens may follow each, one mostly does."""
    followers = torch.randint(5, vocabulary, (vocabulary, 4), generator=torch.Generator().manual_seed(0)).tolist()
    generator = torch.Generator().manual_seed(1000 + seed)
    choices = torch.multinomial(torch.tensor([0.7, 0.1, 0.1, 0.1]), num_tokens, True, generator=generator).tolist()
    token, tokens = 5, []
    for choice in choices:
        token = followers[token][choice]
        tokens.append(token)
    return torch.tensor([tokens])


def train_step(engine, tokens):
    """The loss of one optimizer step, a 0-d tensor on the device."""
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Of the device since the last reset; of a CPU rank since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak():
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def curves(sizes: Sizes, mode: str | None, bf16: bool) -> dict:
    """The loss of each step, and the speed after the first ten."""
    engine = engine_of(sizes.curves, mode=mode, bf16=bf16, stage=1)
    reset_peak()
    vocabulary, steps = sizes.curves.vocab_size, range(sizes.curve_steps)
    batches = [codons(sizes.curve_tokens, vocabulary, step).to(device()) for step in steps]
    losses, started = [], None
    warm_up = min(10, sizes.curve_steps - 1)
    for step, tokens in enumerate(batches):
        if step == warm_up:
            synchronize()
            started = time.perf_counter()
        losses.append(train_step(engine, tokens))
    synchronize()
    seconds = (time.perf_counter() - started) / (sizes.curve_steps - warm_up)
    return {"losses": torch.stack(losses).tolist(), "step_seconds": seconds, "peak_bytes": peak_bytes()}


def table_bytes(sizes: Sizes, mode: str | None) -> dict:
    """Bytes of the position table on this rank in fp32, ZeRO stage 0, and what a training step leaves allocated."""
    engine = engine_of(sizes.table, mode=mode, bf16=False, stage=0)
    tokens = codons(512, sizes.table.vocab_size, 0).to(device())
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    weight = engine.module.position_embedding.weight
    found = {"rows": sizes.table.max_positions, "dim": sizes.table.hidden_size}
    found |= {"weight": weight.nbytes, "gradient": weight.grad.nbytes}
    engine.step()
    optimizer = engine.optimizer if mode is None else engine.ds4sci_table_optimizer.optimizer
    moments = [value for value in optimizer.state[weight].values() if value.shape == weight.shape]
    found["optimizer_state"] = sum(value.nbytes for value in moments)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        found["allocated"] = torch.cuda.memory_allocated()
    return found


def climb(sizes: Sizes, mode: str | None, path: str, probes: list) -> None:
    """Trains longer and longer sequences until one does not fit; a line of JSON per length goes to `path`.

    Args:
        probes: lines of earlier launches, from which the search goes on.
    """
    engine = engine_of(sizes.longest, mode=mode, bf16=torch.cuda.is_available(), stage=1)
    train(engine, sizes.longest_multiple, sizes)  # kernels are loaded, the optimizer states are there
    # Every rank goes on with the same lengths.
    capacity = _agreed(_limit_memory(sizes), dist.ReduceOp.MIN)
    search = Climb(sizes.longest_start, sizes.longest_multiple, sizes.longest.max_positions, capacity)
    for probe in probes:
        search.record(probe["seq_len"], probe["peak_bytes"])
    while (seq_len := search.next_length()) is not None:
        reset_peak()
        synchronize()
        started = time.perf_counter()
        try:
            train(engine, seq_len, sizes)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            _append(path, seq_len=seq_len, peak_bytes=None, seconds=None)
            os._exit(OUT_OF_MEMORY)
        seconds = time.perf_counter() - started
        peak = _agreed(peak_bytes(), dist.ReduceOp.MAX)
        search.record(seq_len, peak)
        if dist.get_rank() == 0:
            _append(path, seq_len=seq_len, peak_bytes=peak, seconds=seconds)


def train(engine, seq_len, sizes):
    generator = torch.Generator().manual_seed(seq_len)
    tokens = torch.randint(5, sizes.longest.vocab_size, (1, seq_len), generator=generator).to(device())
    train_step(engine, tokens)
    synchronize()


def _agreed(number, operation) -> int:
    tensor = torch.tensor(number, dtype=torch.int64, device=device())
    dist.all_reduce(tensor, operation)
    return int(tensor)


def _append(path, **line):
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")


def _is_out_of_memory(error):
    """torch's own error, Python's, and those of NCCL, cuBLAS and the CPU allocator, which have no class."""
    words = ("out of memory", "alloc_failed", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _limit_memory(sizes) -> int:
    """Bytes that there are: the device's; or what a CPU rank uses now and some more, which Linux then enforces."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = in_use + sizes.cpu_headroom_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return peak_bytes() + sizes.cpu_headroom_bytes

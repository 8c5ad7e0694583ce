# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a rung run: one model, one engine, complete training steps on each case (batch size, length).

    python -m tests.benchmarks.long_sequence.worker JOB.json

Started by `launch.py`, which sets RANK and its like. A line of JSON per case goes to the job's output.
"""

import contextlib
import json
import os
import sys
import threading
import time
import types
from pathlib import Path

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import nn

from tests.benchmarks.climb import Climb

OUT_OF_MEMORY = 75
"""Exit status of a rank that has no memory left."""

HOST_MEMORY = 76
"""Exit status of a rank on a machine that has hardly any CPU memory left."""

_MEMINFO = Path("/proc/meminfo")
_KEPT_FREE = 2 * 2**30  # bytes of CPU memory; with less the kernel may kill any process of the machine


def main(path: str) -> int:
    job = json.loads(Path(path).read_text())
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    import deepspeed_ds4sci  # noqa: F401  registers the hooks where the package is not installed
    from deepspeed_ds4sci.training import prepare_cpu

    prepare_cpu()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    device = torch.device(get_accelerator().current_device_name())
    began = time.perf_counter()
    host = HostMemory(beside_others=job["beside_others"])
    model, mpu = llama(job, device) if job["kind"] == "alst" else decoder(job, device)
    engine, *_ = deepspeed.initialize(model=model, config=job["ds_config"], mpu=mpu)
    make_states(engine, job, device)
    if job["device_gib"] is not None and device.type == "cuda":
        limit_device(job["device_gib"], device)
    say(job, {"event": "ready", "seconds": time.perf_counter() - began})
    for batch_size, length in cases(job, device):
        say(job, {"event": "trying", "batch_size": batch_size, "length": length})
        result = measure(engine, job, batch_size, length, device) | {"host_gib": host.peak_gib()}
        say(job, result)
        if result["status"] != "ok":
            # Memory is in pieces now, and another rank may wait for this one for ever: all end here.
            os._exit(OUT_OF_MEMORY)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def cases(job, device):
    """(batch size, tokens) in turn: those of the job, then what its search asks for, by the peaks of this process."""
    yield from job["cases"]
    if job["climb"] is None:
        return
    cuda = device.type == "cuda"

    def agreed(nbytes):  # all ranks go on with the same length
        most = torch.tensor(nbytes, dtype=torch.int64, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    # The rest is CUDA's and lost between blocks.
    whole = torch.cuda.mem_get_info()[1] if cuda else 0
    if job["device_gib"] is not None:
        whole = min(whole, job["device_gib"] * 2**30)
    capacity = int(0.975 * whole)
    peaks = {0: agreed(torch.cuda.memory_allocated() if cuda else 0)} | dict(job["climb"]["peaks"])
    climb = Climb(**job["climb"] | {"capacity": capacity, "peaks": peaks})
    while (length := climb.next_length()) is not None:
        yield 1, length
        climb.record(length, agreed(torch.cuda.max_memory_allocated() if cuda else 0))


def make_states(engine, job, device):
    """A short training step. Without it the first length of a process could fit only because the optimizer's states
    do not exist before its step, and a search would find lengths that train once and no more."""
    lengths = [length for _, length in job["cases"]] or [job["climb"]["start"]]
    length = min(256, *lengths)
    if measure(engine, job | {"steps": 1}, 1, length, device)["status"] != "ok":
        os._exit(OUT_OF_MEMORY)


def limit_device(gib: float, device) -> None:
    """From now on this process gets no more of the GPU than a card of `gib` would have left for it: what CUDA, the
    collectives and other processes hold beside torch's allocator counts, as it is now. One that has had more by then
    is out of memory.

    Raises:
        ValueError: a GPU that has less.
    """
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    if gib * 2**30 > total:
        raise ValueError(f"--device-gib must be at most {total / 2**30:.2f}, what the GPU has, got {gib}")
    beside = total - free - torch.cuda.memory_reserved(device)
    left = gib * 2**30 - beside
    if torch.cuda.max_memory_allocated(device) > left:
        os._exit(OUT_OF_MEMORY)
    torch.cuda.set_per_process_memory_fraction(left / total, device)


def say(job, record):
    if dist.get_rank() == 0:
        with open(job["output"], "a") as file:
            file.write(json.dumps(record) + "\n")


def measure(engine, job, batch_size, length, device) -> dict:
    """Up to job["steps"] complete training steps on `batch_size` sequences of a length; the last is timed.

    The first also locks pages and tunes kernels, so that a later one is timed where there is time for it.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, loss, failure = [], None, ""
    try:
        for step in range(job["steps"]):
            began = time.perf_counter()
            loss = train_step(engine, job, (batch_size, length), step, device)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            if not another_fits(seconds[-1], job, device):
                break
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failure = str(error).splitlines()[0][:200]
    peaks = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if cuda else [0, 0]
    found = {
        "event": "case",
        "batch_size": batch_size,
        "length": length,
        "status": "out of memory" if failure else "ok",
        "device_gib": peaks[0] / 2**30,
        "reserved_gib": peaks[1] / 2**30,
        "seconds": None if failure else seconds[-1],
        "timed_step": None if failure else len(seconds),
        "step_seconds": seconds,
        "loss": loss,
    }
    return found | ({"failure": failure} if failure else {})


def another_fits(took: float, job, device) -> bool:
    """Whether a step like the last one is short enough and ends before the job does, as the first rank sees it."""
    left = job["until"] - time.monotonic()
    fits = torch.tensor(int(took <= min(job["repeat_under"], left)), device=device)
    dist.broadcast(fits, 0)
    return bool(fits)


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "memory" in str(error).lower()


class HostMemory:
    """The most CPU memory in use since this was made: the process's resident memory, or, where that is more, what the
    machine has less available. Page-locked memory that the driver allocates is missing from the first. Where the last
    2 GiB are reached the process ends, with HOST_MEMORY.

    beside_others: other programs run, whose memory is not to be counted: the resident memory alone, a lower bound.
    """

    def __init__(self, every: float = 0.1, *, beside_others: bool = False):
        self._beside_others = beside_others
        self._before = self._least = _number(_MEMINFO, "MemAvailable:")
        self._thread = threading.Thread(target=self._watch, args=(every,), daemon=True)
        self._thread.start()

    def _watch(self, every):
        while True:
            self._least = min(self._least, _number(_MEMINFO, "MemAvailable:"))
            if host_memory_left() < _KEPT_FREE:
                os._exit(HOST_MEMORY)
            time.sleep(every)

    def peak_gib(self) -> float:
        machine = 0 if self._beside_others else self._before - self._least
        return max(_number("/proc/self/status", "VmHWM:"), machine) / 2**20


def host_memory_left(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of CPU memory that this process can still have: what the machine has available, or its container, whose
    limit does not show there and counts the page cache, which the kernel gives up when it must."""
    left = _number(_MEMINFO, "MemAvailable:") * 1024
    try:
        most, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if most != "max":
            cached = sum(_number(cgroup / "memory.stat", name) for name in ("inactive_file", "active_file"))
            left = min(left, int(most) - int(used) + cached)
    except OSError:
        pass  # no such group, as on a machine without containers
    return left


def _number(path, name):
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.split()[0] == name)


def train_step(engine, job, shape, step, device) -> float:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(5, 69, shape, generator=generator).to(device)
    if job["kind"] == "alst":
        loss = engine(**alst_batch(job, tokens))
    else:
        batch = {"input_ids": tokens, "labels": tokens}
        if job["device_mask"]:
            batch["attention_mask"] = mask_on_device(shape[1], device)
        loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def mask_on_device(length, device):
    """[1, 1, S, S] bool, True = keep, in the way of Megatron: fp32 ones, their lower triangle, a comparison."""
    return torch.tril(torch.ones((1, 1, length, length), device=device)) >= 0.5


@contextlib.contextmanager
def built_for(job, device):
    """Weights are made on the device, in the dtype of training."""
    previous = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if "bf16" in job["ds_config"] else torch.float32)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(previous)


def decoder(job, device):
    from deepspeed_ds4sci.models import GenSLM, GenSLMConfig

    with built_for(job, device):
        model = GenSLM(GenSLMConfig(**job["model"]))
    compute_some(model.layers, job)
    return model.train(), None


def compute_some(layers, job):
    """job["compute_layers"] of the layers are computed, all of them if it is None.

    Half of them at either end: what a layer needs while it goes backward comes on top of all checkpoints in the last
    one, and on top of all gradients in the first.
    """
    computed = job["compute_layers"]
    if computed is not None:
        for layer in layers[(computed + 1) // 2 : len(layers) - computed // 2]:
            layer.forward = types.MethodType(stand_in, layer)


def stand_in(self, hidden, *context, **others):
    """A layer that is not computed: its weights get (zero) gradients and optimizer states, its output is a new tensor
    like any layer's, and what it starts from is kept as a checkpoint like any layer's."""
    # The square is saved for the backward pass: a layer that saves nothing is not computed again, and torch then drops
    # what it starts from at once.
    nothing = sum(parameter.flatten()[0].square() for parameter in self.parameters()) * 0
    return hidden + nothing.to(hidden.dtype)


def llama(job, device):
    """DeepSpeed's own path on a Llama-shaped model of the same size, with the tricks that the rung says.

    recompute: transformers' gradient checkpointing. tiled: DeepSpeed's TiledMLP and TiledFusedLogitsLoss. host:
    checkpoints in page-locked CPU memory by torch's save_on_cpu, since ALST's own function for it is in another
    package. On two ranks: UlyssesSPAttentionHF.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    tricks = job["tricks"]
    if "tiled" in tricks:
        modeling_llama.LlamaMLP.forward = _tiled_mlp
    with built_for(job, device):
        config = LlamaConfig(**job["model"], attn_implementation="sdpa", use_cache=False)
        model = LlamaForCausalLM(config).train()
    compute_some(model.model.layers, job)
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, "sdpa", sequence_parallel_size=dist.get_world_size(), micro_batch_size=1
    )
    if "recompute" in tricks:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if "host" in tricks:
        model._set_gradient_checkpointing(True, gradient_checkpointing_func=_checkpoint_in_host_memory)
    return AlstLoss(model, tiled="tiled" in tricks), mpu


def _checkpoint_in_host_memory(function, *args):
    # Reentrant: only then what a checkpoint starts from is a saved tensor, which the hook moves.
    with torch.autograd.graph.save_on_cpu(pin_memory=args[0].is_cuda):
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)


def _tiled_mlp(self, x):
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def compute(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    shards = -(-x.shape[1] // x.shape[2])
    weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
    return TiledMLP.apply(compute, self, x, shards, weights)


class AlstLoss(nn.Module):
    """The model with its loss, whole or by DeepSpeed's TiledFusedLogitsLoss."""

    def __init__(self, model, tiled):
        super().__init__()
        self.model, self.tiled = model, tiled

    def forward(self, input_ids, position_ids, labels):
        hidden = self.model.model(input_ids=input_ids, position_ids=position_ids).last_hidden_state
        if not self.tiled:
            return _token_loss(self.model.lm_head, hidden, labels)
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        shards = -(-hidden.shape[1] // 16384)
        weights = [self.model.lm_head.weight]
        return TiledFusedLogitsLoss.apply(
            _token_loss, self.model.lm_head, hidden, labels, None, shards, weights, "mean"
        )


def _token_loss(head, hidden, labels):
    return nn.functional.cross_entropy(head(hidden).float().flatten(0, -2), labels.flatten())


def alst_batch(job, tokens):
    """This rank's contiguous part of the sequence; labels are shifted before it is cut."""
    size, rank = dist.get_world_size(), dist.get_rank()
    labels = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    cut = [each.chunk(size, dim=1)[rank].contiguous() for each in (tokens, positions, labels)]
    batch = dict(zip(("input_ids", "position_ids", "labels"), cut, strict=True))
    # Alone, a rank needs none: transformers would look for documents in them.
    return batch if size > 1 else batch | {"position_ids": None}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

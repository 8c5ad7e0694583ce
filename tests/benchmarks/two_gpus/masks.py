# SPDX-License-Identifier: Apache-2.0
"""Training with an explicit attention mask on one rank: built on the device, in CPU memory, or the plain way."""

import gc
import os
import time
from functools import partial

import torch

from deepspeed_ds4sci.models import GenSLM
from deepspeed_ds4sci.sequence.masks import MaskFactory
from tests.benchmarks.two_gpus.sizes import Sizes
from tests.benchmarks.two_gpus.workers import peak_bytes, reset_peak, synchronize
from tests.distributed.engine_worker import device

_NOTHING = {"seconds": None, "peak_bytes": None}


def plain(seq_len: int) -> torch.Tensor:
    """[1, 1, S, S] bool, made as a script makes it that thinks of nothing."""
    return torch.ones(seq_len, seq_len, device=device()).tril().bool()[None, None]


def ways(seq_len: int) -> dict:
    """{name: function that builds the mask}: the factory on both sides of its threshold, and `plain`."""
    return {
        "plain, on the device": lambda: plain(seq_len),
        "factory, on the device": lambda: MaskFactory(device(), cpu_threshold=seq_len)(seq_len),
        "factory, in CPU memory": lambda: MaskFactory(device(), cpu_threshold=seq_len - 1)(seq_len),
    }


def masks(sizes: Sizes) -> list[dict]:
    """A row per length and way: seconds and peak bytes on the device while building, and of a whole training step.

    None where the device ran out of memory. Building peaks are beyond what was there. CPU ranks have no device memory
    to speak of: their peaks are None.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # of a launch of ranks this one has the CPU for itself
    torch.manual_seed(0)
    with torch.device(device()):
        model = GenSLM(sizes.masks)
    if torch.cuda.is_available():
        model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rows = []
    for seq_len in sizes.mask_lengths:
        tokens = torch.randint(5, sizes.masks.vocab_size, (1, seq_len)).to(device())
        for name, build in ways(seq_len).items():
            mask, built = _measured(build)
            fits = mask is not None
            del mask  # the step builds its own
            step = _measured(partial(_step, model, optimizer, tokens, build))[1] if fits else _NOTHING
            chosen = _chosen(name, seq_len, sizes.mask_threshold)
            rows.append({"seq_len": seq_len, "way": name, "chosen": chosen, "build": built, "step": step})
    return rows


def _chosen(name, seq_len, threshold):
    """Whether a factory with this threshold builds the mask this way."""
    return name == ("factory, in CPU memory" if seq_len > threshold else "factory, on the device")


def _step(model, optimizer, tokens, build):
    model(tokens, tokens, attention_mask=build()).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _measured(run):
    """(what it returns, {"seconds", "peak_bytes"}) of the second of two runs; Nones where memory ran out."""
    try:
        run()
        gc.collect()
        reset_peak()
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        synchronize()
        started = time.perf_counter()
        result = run()
        synchronize()
        seconds = time.perf_counter() - started
        peak = peak_bytes() - before if torch.cuda.is_available() else None
        return result, {"seconds": seconds, "peak_bytes": peak}
    except torch.OutOfMemoryError:
        gc.collect()
        reset_peak()
        return None, _NOTHING

# SPDX-License-Identifier: Apache-2.0
"""The CPU path against eager PyTorch: `python -m tests.benchmarks.cpu_tiled`.

Forward and backward in fp32 with both biases and all five gradients. Prints the time of each way, the ratio, and the
memory each needs beyond inputs, outputs and gradients. Time: the ways take turns in one process, median and quartiles.
Memory: one process per way, growth of the resident set at its highest (Linux). Exits with 1 where a bar is missed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention
from tests.helpers.inputs import AttentionInputs, make_inputs
from tests.helpers.numerics import eager_evoformer_attention
from tests.helpers.shapes import AttentionShape

BAR_SHAPE = AttentionShape("cpu-bar", 1, 64, 256, 256, 4, 32, "bar of the CPU path")
MIN_SPEEDUP = 1.5
MAX_MEMORY_SHARE = 0.1
TINY = AttentionShape("tiny", 1, 2, 16, 16, 2, 16, "loads code and threads before memory is counted")


def eager_einsum(q: Tensor, k: Tensor, v: Tensor, *, mask_bias: Tensor, pair_bias: Tensor) -> Tensor:
    """Eager PyTorch as einsum; `eager_evoformer_attention` is the same with matmul."""
    logits = torch.einsum("bnqhd,bnkhd->bnhqk", q * q.shape[-1] ** -0.5, k) + mask_bias + pair_bias
    return torch.einsum("bnhqk,bnkhd->bnqhd", torch.softmax(logits, dim=-1), v)


def tiled(q: Tensor, k: Tensor, v: Tensor, *, mask_bias: Tensor, pair_bias: Tensor) -> Tensor:
    return evoformer_attention(q, k, v, mask_bias=mask_bias, pair_bias=pair_bias, implementation="tiled")


WAYS: dict[str, Callable[..., Tensor]] = {
    "eager_matmul": eager_evoformer_attention,
    "eager_einsum": eager_einsum,
    "tiled": tiled,
}


def forward_backward(way: str, inputs: AttentionInputs) -> tuple[Tensor, ...]:
    o = WAYS[way](inputs.q, inputs.k, inputs.v, mask_bias=inputs.mask_bias, pair_bias=inputs.pair_bias)
    return (o, *torch.autograd.grad(o, list(inputs.differentiable().values()), inputs.do))


def measure_times(shape: AttentionShape, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repeat; the ways take turns, so that a busy moment of the machine meets all of them."""
    inputs = make_inputs(shape)
    for way in WAYS:
        forward_backward(way, inputs)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way, results in times.items():
            start = time.perf_counter()
            forward_backward(way, inputs)
            results.append((time.perf_counter() - start) * 1e3)
    return times


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def print_extra_bytes(way: str, shape: AttentionShape) -> None:
    """In a process of its own: print the peak resident memory of one run beyond inputs, outputs and gradients."""
    forward_backward(way, make_inputs(TINY))
    inputs = make_inputs(shape)
    with open("/proc/self/clear_refs", "w") as counter:
        counter.write("5")  # the highest resident size so far becomes the present one
    before = _status_bytes("VmRSS")
    results = forward_backward(way, inputs)
    grown = _status_bytes("VmHWM") - before
    print(json.dumps(grown - sum(x.numel() * x.element_size() for x in results)))


def measure_memory(way: str, shape: AttentionShape) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.cpu_tiled", "--memory-of", way, *_shape_arguments(shape)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _shape_arguments(shape: AttentionShape) -> list[str]:
    return ["--shape", ",".join(str(n) for n in (shape.batch, shape.rows, shape.q_len, shape.heads, shape.head_dim))]


def _parse_shape(text: str) -> AttentionShape:
    batch, rows, length, heads, head_dim = (int(part) for part in text.split(","))
    return AttentionShape("given", batch, rows, length, length, heads, head_dim, "command line")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=_parse_shape, default=BAR_SHAPE, help="B,N,L,H,D (default 1,64,256,4,32)")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each way")
    parser.add_argument("--memory-of", choices=sorted(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print_extra_bytes(arguments.memory_of, arguments.shape)
        return 0
    shape = arguments.shape
    times = measure_times(shape, arguments.repeats)
    memory = {way: measure_memory(way, shape) for way in WAYS}
    print(
        f"[B, N, L, H, D] = {[shape.batch, shape.rows, shape.q_len, shape.heads, shape.head_dim]}, fp32, forward and "
        f"backward, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{'':14}{'median ms':>10}{'quartiles':>16}{'extra MiB':>11}")
    for way, results in times.items():
        low, middle, high = statistics.quantiles(results, n=4)
        print(f"{way:14}{middle:10.0f}{f'{low:.0f} - {high:.0f}':>16}{memory[way] / 2**20:11.1f}")
    eager = min((way for way in WAYS if way != "tiled"), key=lambda way: statistics.median(times[way]))
    speedup = statistics.median(times[eager]) / statistics.median(times["tiled"])
    share = memory["tiled"] / min(memory[way] for way in WAYS if way != "tiled")
    print(
        f"tiled is {speedup:.2f} x as fast as {eager} (bar {MIN_SPEEDUP}) with {share:.3f} of the least eager memory "
        f"(bar {MAX_MEMORY_SHARE})"
    )
    return int(speedup < MIN_SPEEDUP or share > MAX_MEMORY_SHARE)


if __name__ == "__main__":
    sys.exit(main())

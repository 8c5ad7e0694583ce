# SPDX-License-Identifier: Apache-2.0
"""What one call of the op costs the host: `python -m tests.benchmarks.host_overhead`.

A problem so small that its kernels do not count, with a mask and a pair bias, and gradients of q, k, v and the pair
bias. On the CPU a library without kernels (tests/helpers/stub_library.cpp) stands in for the compiled one. Where a GPU
is there the compiled one runs too: calls are enqueued in bursts that the launch queue takes without waiting.

Columns, in microseconds per call of the fastest burst: the whole call; of that inside `Extension` (memory,
parameters, the library); of that inside the library's C functions (on a GPU: the launches). "Autograd alone" is a
torch.autograd.Function that allocates the same outputs and nothing else: no op in Python can cost less.
"""

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch

from deepspeed_ds4sci import evoformer_attention
from deepspeed_ds4sci.ops import _dispatch, sm80
from deepspeed_ds4sci.ops._extension import Extension, extension
from tests.helpers.inputs import AttentionInputs, make_inputs
from tests.helpers.shapes import AttentionShape
from tests.helpers.stub_library import build

TINY = AttentionShape("tiny", 1, 16, 16, 16, 4, 32, "the smallest of whole tiles")
CALLS_PER_BURST = 20  # few enough for the launch queue, and for a burst that nothing interrupts


@dataclass(frozen=True)
class Row:
    """Microseconds of one call. `extension` and `library` are None where nothing passes through them."""

    where: str
    what: str
    total: float
    extension: float | None = None
    library: float | None = None


class _Stopwatch:
    """A function that adds up the seconds spent in it."""

    def __init__(self, function: Callable):
        self._function = function
        self.seconds = 0.0

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        result = self._function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


class _AutogradAlone(torch.autograd.Function):
    """What the op's autograd function does apart from computing."""

    @staticmethod
    def forward(ctx, q, k, v, mask_bias, pair_bias):
        o = torch.empty_like(q)
        lse = q.new_empty((*q.shape[:2], q.shape[3], q.shape[2]), dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask_bias, pair_bias, o, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, _dlse):
        q, k, v, _, pair_bias, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, torch.empty_like(pair_bias)


def _passes(inputs: AttentionInputs, attend: Callable) -> dict[str, Callable[[], object]]:
    wanted = (inputs.q, inputs.k, inputs.v, inputs.pair_bias)

    def forward():
        with torch.no_grad():
            attend()

    return {
        "forward": forward,
        "forward, recorded": attend,
        "forward + backward": lambda: torch.autograd.grad(attend(), wanted, inputs.do),
    }


def _fastest(run: Callable[[], object], bursts: int, synchronize: Callable[[], None], watches=()) -> list[float]:
    """Microseconds per call of the fastest burst, as other work only adds: the whole, then each of `watches`."""
    samples = []
    for _ in range(bursts + 1):
        before = [watch.seconds for watch in watches]
        start = time.perf_counter()
        for _ in range(CALLS_PER_BURST):
            run()
        seconds = [time.perf_counter() - start, *(w.seconds - b for w, b in zip(watches, before, strict=True))]
        synchronize()
        samples.append([round(1e6 * s / CALLS_PER_BURST, 1) for s in seconds])
    return min(samples[1:])  # the first one fills caches


def _measured(
    where: str, device: str, implementation: str, library: Extension, bursts: int, path: str = "sm80"
) -> Iterator[Row]:
    """Rows of one implementation, and first of autograd alone on the same device."""
    inputs = make_inputs(TINY, torch.bfloat16, device, mask="bool")
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    functions = library._of(path)
    layers = [(library, "forward"), (library, "backward"), (functions, "fwd"), (functions, "bwd")]

    def attend():
        return evoformer_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            mask_bias=inputs.mask_bias,
            pair_bias=inputs.pair_bias,
            implementation=implementation,
        )

    for what, run in _passes(inputs, lambda: _AutogradAlone.apply(*inputs.tensors()[:5])[0]).items():
        yield Row(where, f"autograd alone, {what}", *_fastest(run, bursts, synchronize))
    for what, run in _passes(inputs, attend).items():
        (total,) = _fastest(run, bursts, synchronize)
        watches = [_Stopwatch(getattr(owner, name)) for owner, name in layers]
        with ExitStack() as patches:
            for (owner, name), watch in zip(layers, watches, strict=True):
                patches.enter_context(mock.patch.object(owner, name, watch))
            # The stopwatches cost something themselves: the total is the one from before.
            _, *layered = _fastest(run, bursts, synchronize, watches)
        inside = [round(forward + backward, 1) for forward, backward in (layered[:2], layered[2:])]
        yield Row(where, f"evoformer_attention, {what}", total, *inside)


@contextmanager
def stub_runs_as_sm80() -> Iterator[Extension]:
    """implementation="sm80" takes CPU tensors and computes nothing."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        library = Extension(build(Path(folder), with_sm90=False))
        patches.enter_context(mock.patch.object(sm80, "extension", lambda: library))
        patches.enter_context(mock.patch.object(type(sm80.SM80), "unsupported_reason", lambda self, problem: None))
        _dispatch.forget_choices()
        try:
            yield library
        finally:
            _dispatch.forget_choices()


def measure(bursts: int) -> list[Row]:
    """All rows: the stub's if there is a C++ compiler, the compiled library's if there is a GPU."""
    rows = []
    if shutil.which("g++"):
        with stub_runs_as_sm80() as library:
            rows += _measured("CPU, stub", "cpu", "sm80", library, bursts)
    if torch.cuda.is_available():
        inputs = make_inputs(TINY, torch.bfloat16, "cuda")
        problem = _dispatch.problem_of(inputs.q, inputs.k, inputs.pair_bias, TINY.head_dim**-0.5)
        for entry in _dispatch.implementations():
            if entry.name in ("sm80", "sm90") and entry.unsupported_reason(problem) is None:
                where = f"{torch.cuda.get_device_name()}, {entry.name}"
                rows += _measured(where, "cuda", entry.name, extension(), bursts, entry.name)
    return rows


def table(rows: list[Row]) -> str:
    lines = [f"{'':<72} {'total':>8} {'Extension':>10} {'library':>8}  us"]
    for row in rows:
        inside = ["-" if x is None else f"{x:.1f}" for x in (row.extension, row.library)]
        lines.append(f"{row.where + ': ' + row.what:<72} {row.total:>8.1f} {inside[0]:>10} {inside[1]:>8}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--bursts", type=int, default=200, help=f"of {CALLS_PER_BURST} calls each; default 200")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    if options.bursts < 1:
        parser.error(f"--bursts must be at least 1, got {options.bursts}")
    torch.set_num_threads(1)
    rows = measure(options.bursts)
    if not rows:
        parser.exit(1, "nothing to measure: no g++ to compile the stub with, and no CUDA GPU\n")
    print(table(rows))
    if options.json is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**versions, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()

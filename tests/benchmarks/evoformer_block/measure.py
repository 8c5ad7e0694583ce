# SPDX-License-Identifier: Apache-2.0
"""One variant of one block: bounded in time, checked against fp32, then timed; every failure becomes a result."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deepspeed_ds4sci.ops.evoformer_attention import evoformer_attention
from tests.benchmarks.evoformer_block.problem import BlockCase, Problem
from tests.benchmarks.evoformer_block.variants import Attend, Variant, attention_by
from tests.benchmarks.measure import Result, clean_up, failure, rounded
from tests.benchmarks.timing import CpuClock, CudaClock, Timing
from tests.benchmarks.verify import relative_error

# Largest relative rms error of what is compared. A block in bf16 is a chain of some forty roundings, to which a kernel
# adds its own: eager PyTorch reaches 3e-2 in the inputs' gradients. A lost bias gradient is an error of 1.
LIMITS = {"bf16": 2e-1, "fp32": 5e-3}
EXACT_LOGITS = 2**27  # of the reference at a time: 512 MiB in fp32


class TimeIsUp(BaseException):
    """Not an Exception: compilers catch those and try something else."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeIsUp in the main thread. What runs outside of Python, such as a kernel, is waited for."""

    def stop(number, frame):
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class BlockResult(Result):
    """One figure; `status` can also be "timeout" (longer than its limit) and "skipped" (the run's time was used up).

    attention: milliseconds of the attention calls alone, on the tensors that they get in the block; None where they
    are not apart. first_s: seconds of the first run, compilation included.
    """

    attention: Timing | None = None
    first_s: float | None = None

    def as_json(self) -> dict:
        plain = super().as_json()
        if self.attention is not None:
            plain["attention"] = {name: rounded(value) for name, value in plain["attention"].items()}
        if self.first_s is not None:
            plain["first_s"] = rounded(self.first_s)
        return plain


def exact_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, pair_bias: Tensor | None, gate: Tensor) -> Tensor:
    """The definition of the op, some rows at a time, recomputed in the backward pass: large blocks fit in fp32."""
    rows, length, heads = q.shape[1:4]
    parts = min(rows, math.ceil(rows * heads * length**2 / EXACT_LOGITS))

    def attend(q, k, v, keep, gate):
        return evoformer_attention(q, k, v, mask_bias=keep, pair_bias=pair_bias, gate=gate, implementation="reference")

    slices = zip(*(x.tensor_split(parts, dim=1) for x in (q, k, v, keep, gate)), strict=True)
    return torch.cat([checkpoint(attend, *part, use_reentrant=False) for part in slices], dim=1)


def is_compared(name: str) -> bool:
    """Outputs, gradients of the inputs, and gradients of the attention modules' weights.

    Not biases and norms: their gradients are sums over all rows that largely cancel, so that in bf16 rounding anywhere
    in the block moves them by as much as an error in attention would.
    """
    return "." not in name or ("_att_" in name and name.endswith("weight") and "layer_norm" not in name)


def errors_of(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative rms error of everything that is compared."""
    return {name: relative_error(actual[name], expected[name]) for name in expected if is_compared(name)}


class BlockBench:
    """Measures variants of blocks, one process, one device.

    limit_s: seconds that one variant of one block may take, `total_s`: that all of them may take together, from the
    moment on at which it is known whether the first can run: that may compile our kernels.
    `fatal` is set when a CUDA error has made the process useless; what was measured before stays valid.
    """

    def __init__(
        self, device: torch.device, clock: CudaClock | CpuClock, min_ms: float, limit_s: float, total_s: float
    ):
        self.device = device
        self.clock = clock
        self.min_ms = min_ms
        self.limit_s = limit_s
        self.total_s = total_s
        self.end: float | None = None
        self.fatal: str | None = None
        self._prepared: dict[BlockCase, tuple[Problem, dict[str, Tensor]]] = {}

    def prepared(self, case: BlockCase) -> tuple[Problem, dict[str, Tensor]]:
        """The problem and its results in fp32, made at the first call."""
        if case not in self._prepared:
            problem = Problem.of(case, self.device)
            with attention_by(exact_attention):
                self._prepared[case] = problem, problem.upcast().run()
        return self._prepared[case]

    def measure(self, case: BlockCase, variant: Variant) -> BlockResult:
        """Never raises for what the variant does."""
        result = BlockResult(case, variant.name, "fwd+bwd")
        missing, refused = variant.missing(self.device.type), variant.refused_reason(case)
        self.end = self.end or time.monotonic() + self.total_s
        left = self.end - time.monotonic()
        if missing or refused:
            result.status, result.reason = ("missing", missing) if missing else ("refused", refused)
        elif left <= 0:
            result.status, result.reason = "skipped", f"the {self.total_s:g} s of --total-s were used up"
        else:
            problem, expected = self.prepared(case)
            seconds = min(self.limit_s, left)
            try:
                with time_limit(seconds):
                    self._fill(result, problem, expected, variant)
            except TimeIsUp:
                result.status, result.reason = "timeout", f"longer than {seconds:.0f} s"
            except Exception as error:  # a peer may raise anything; the table goes on
                result.status, result.reason = failure(error)
            self.fatal = clean_up(self.device)
        return result

    def _fill(self, result: BlockResult, problem: Problem, expected: dict[str, Tensor], variant: Variant) -> None:
        attend = variant.make()
        with attention_by(attend):
            forward = variant.forward_of(problem.module)
            start = time.monotonic()
            actual = problem.run(forward)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            result.first_s = time.monotonic() - start
            errors = errors_of(actual, expected)
            del actual
            worst = sorted(errors, key=errors.get)[-4:]
            limit = LIMITS[result.case.dtype]
            result.errors = {name: errors[name] for name in worst}
            bad = [f"{name} {errors[name]:.1e}" for name in reversed(worst) if not errors[name] <= limit]
            if bad:
                result.status, result.reason = "WRONG", f"relative error above {limit:.0e}: {', '.join(bad)}"
                return
            result.extra_mib = self.clock.extra_memory(lambda: problem.run(forward))
            timing = self.clock.time(lambda: problem.run(forward), self.min_ms)
        if not variant.whole:
            result.attention = self._attention_alone(problem, attend)
        result.timing = timing

    def _attention_alone(self, problem: Problem, attend: Attend) -> Timing:
        """All attention calls of one pass one after the other, forward and backward, outside the block."""
        calls = recorded_calls(problem, attend)

        def run() -> None:
            for tensors, leaves, grad_o in calls:
                torch.autograd.grad(attend(*tensors), leaves, grad_o)

        return self.clock.time(run, self.min_ms)


def recorded_calls(problem: Problem, attend: Attend) -> list[tuple[tuple, list[Tensor], Tensor]]:
    """What a pass of the block gives to its attention: (arguments, those with a gradient, gradient of the output).

    In the layouts of the block; the arguments are cut off from what made them.
    """
    calls = []

    def record(*arguments: Tensor | None) -> Tensor:
        o = attend(*arguments)
        tensors = tuple(None if x is None else x.detach().requires_grad_(x.requires_grad) for x in arguments)
        leaves = [x for x in tensors if x is not None and x.requires_grad]
        o.register_hook(lambda grad: calls.append((tensors, leaves, grad.detach())))
        return o

    with attention_by(record):
        problem.run()
    return calls

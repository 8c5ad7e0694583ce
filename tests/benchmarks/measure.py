# SPDX-License-Identifier: Apache-2.0
"""One implementation on one case: gate, times, memory; every failure becomes a result."""

import gc
import math
from dataclasses import asdict, dataclass, field

import torch

from tests.benchmarks.case import Case, make_inputs, with_samples_as_rows
from tests.benchmarks.peers import Call, Peer
from tests.benchmarks.timing import CpuClock, CudaClock, Timing
from tests.benchmarks.verify import Expected, errors_of, expect, run_once, wrong_reason

PASSES = ("fwd", "fwd+bwd")


@dataclass(frozen=True)
class Settings:
    """What to measure besides the time of each pass."""

    passes: tuple[str, ...] = PASSES
    min_ms: float = 200.0  # of repetitions, after warm-up
    memory: bool = True  # peak of forward + backward
    graph_logits: int = 0  # replay as a CUDA graph too, up to this many logits


@dataclass
class Result:
    """One figure of the table. Times in milliseconds, memory in MiB above the inputs.

    status: "ok", or why there is no time: "missing" (cannot run here), "refused" (not offered for this shape), "OOM",
    "WRONG" (did not pass the gate), "failed" (an error).
    """

    case: Case
    implementation: str
    which: str  # pass: "fwd" or "fwd+bwd"
    mode: str = "eager"  # or "graph"
    status: str = "ok"
    reason: str = ""
    timing: Timing | None = None
    tflops: float | None = None
    extra_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict:
        plain = asdict(self)
        # JSON has no infinity; an error that is not finite is named.
        plain["errors"] = {k: rounded(v) if math.isfinite(v) else "not finite" for k, v in self.errors.items()}
        if self.timing is not None:
            plain["timing"] = {name: rounded(value) for name, value in plain["timing"].items()}
        if self.tflops is not None:
            plain["tflops"] = rounded(self.tflops)
        if self.extra_mib is not None:
            plain["extra_mib"] = rounded(self.extra_mib)
        return plain


def rounded(value: float) -> float:
    """To five significant digits: more would be noise in the committed records."""
    return value if isinstance(value, int) else float(f"{value:.5g}")


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def failure(error: Exception) -> tuple[str, str]:
    """Status and reason of an exception."""
    if isinstance(error, torch.OutOfMemoryError):
        return "OOM", "does not fit into the GPU's memory"
    return "failed", first_line(error)


def clean_up(device: torch.device) -> str | None:
    """Frees what a measurement left behind; returns the error of a device that has become useless, else None."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return first_line(error)
    return None


class Bench:
    """Measures implementations on cases, one process, one device.

    `fatal` is set when a CUDA error has made the process useless; what was measured before stays valid.
    """

    def __init__(self, device: torch.device, clock: CudaClock | CpuClock, settings: Settings):
        self.device = device
        self.clock = clock
        self.settings = settings
        self.fatal: str | None = None

    def expect(self, case: Case) -> Expected:
        """Reference results that every implementation of this case is compared with."""
        return expect(*with_samples_as_rows(case, make_inputs(case, self.device)))

    def measure(self, case: Case, peer: Peer, expected: Expected) -> list[Result]:
        """Results of all passes and modes; never raises for what the implementation does."""
        passes = self.settings.passes
        status, reason, call = self._bind(case, peer)
        if call is None:
            return [Result(case, peer.name, which, status=status, reason=reason) for which in passes]
        results = []
        for which in passes:
            if which == "fwd" or peer.has_backward:
                results += self._pass(case, peer, call, expected, which)
            else:
                results.append(Result(case, peer.name, which, status="refused", reason="forward only"))
        del call
        self._clean_up()
        return results

    def _bind(self, case: Case, peer: Peer) -> tuple[str, str, Call | None]:
        """(status, reason, call); without a call the status says why."""
        try:
            reason = peer.unavailable_reason(self.device.type)
            if reason is not None:
                return "missing", reason, None
            reason = "has no gate" if case.gate and not peer.takes_gate else peer.refused_reason(case)
            if reason is not None:
                return "refused", reason, None
            inputs = make_inputs(case, self.device)
            if not peer.shares_pair_bias:
                case, inputs = with_samples_as_rows(case, inputs)
            return "ok", "", peer.bind(case, inputs)
        except NotImplementedError as error:
            status, reason = "refused", first_line(error)
        except Exception as error:
            status, reason = failure(error)
        self._clean_up()
        return status, reason, None

    def _pass(self, case: Case, peer: Peer, call: Call, expected: Expected, which: str) -> list[Result]:
        """Gate, memory, eager time and, for small cases, graph time of one pass."""
        try:
            errors = errors_of(case, call, expected, backward=which == "fwd+bwd")
            wrong = wrong_reason(case, errors)
            if wrong:
                return [Result(case, peer.name, which, status="WRONG", reason=wrong, errors=errors)]
            run = self._runner(call, which)
            extra = self.clock.extra_memory(run) if self.settings.memory else None
            results = [self._timed(Result(case, peer.name, which, errors=errors, extra_mib=extra), run)]
        except Exception as error:  # a peer may raise anything; the table goes on
            status, reason = failure(error)
            results = [Result(case, peer.name, which, status=status, reason=reason)]
        self._clean_up()
        if results[0].status == "ok" and case.logits <= self.settings.graph_logits:
            results.append(self._replayed(Result(case, peer.name, which, mode="graph", errors=errors), peer, run))
        return results

    def _clean_up(self) -> None:
        self.fatal = self.fatal or clean_up(self.device)

    @staticmethod
    def _runner(call, which: str):
        return lambda: run_once(call, which == "fwd+bwd")

    def _timed(self, result: Result, run) -> Result:
        result.timing = self.clock.time(run, self.settings.min_ms)
        result.tflops = result.case.flops(result.which) / result.timing.median / 1e9
        return result

    def _replayed(self, result: Result, peer: Peer, run) -> Result:
        if peer.graph_reason is not None:
            result.status, result.reason = "refused", peer.graph_reason
            return result
        try:
            return self._timed(result, self.clock.graph(run))
        except Exception as error:
            result.status, result.reason = failure(error)
            return result

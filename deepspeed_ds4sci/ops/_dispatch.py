# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: one table, fastest first, decided from sizes alone and so testable without a GPU."""

import importlib
import logging
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepspeed_ds4sci import _logging

from .reference import REFERENCE

logger = logging.getLogger("deepspeed_ds4sci")


class Problem(NamedTuple):
    """Everything the choice may depend on; no tensors. Looked up in every call: a tuple has the quickest hash."""

    device_type: str  # "cuda", "cpu", ...
    capability: tuple[int, int] | None  # compute capability of a CUDA device, else None
    dtype: torch.dtype  # of q, k, v
    batch: int
    rows: int
    q_len: int
    k_len: int
    heads: int
    head_dim: int
    pair_dtype: torch.dtype | None = None  # None: no pair bias
    pair_batch: int = 1  # of the pair bias: B, or 1 where all samples share it; 1 without
    softmax_scale: float = 1.0

    @property
    def rows_sharing_bias(self) -> int:
        """How many rows have the same pair bias: N, or B * N where all samples share it or there is none."""
        return self.batch * self.rows if self.pair_batch == 1 else self.rows


class Implementation(Protocol):
    """One way to compute the op. Tensors are laid out as in `evoformer_attention`; none is empty.

    q, k, v, gate and do come with a unit last stride and any other strides, 0 included; biases come with any strides.
    Everything returned is contiguous. Who multiplies with torch decorates `forward` and `backward` with
    `in_own_precision`: autocast may be on, and TF32 allowed.
    """

    name: str

    def unsupported_reason(self, problem: Problem) -> str | None:
        """None if this implementation can run `problem`, else why it cannot: `Missing` if it could, once built."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_bias: Tensor | None,
        pair_bias: Tensor | None,
        gate: Tensor | None,
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        """o [B, N, Lq, H, D], gated, and lse [B, N, H, Lq] of `lse_dtype`, read by this class's `backward` alone."""

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_bias: Tensor | None,
        pair_bias: Tensor | None,
        gate: Tensor | None,
        o: Tensor,
        lse: Tensor,
        softmax_scale: float,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """dq, dk, dv, dmask_bias, dpair_bias, dgate, shaped and typed as their inputs; None where `wanted` is False.

        o: what `forward` returned, the gated one. do: the gradient of that.
        """


class Missing(str):
    """A reason that lies in the installation or its build, not in the problem: on a CUDA device it is a warning."""


class Unavailable:
    """A row of the table that never runs and says why."""

    def __init__(self, name: str, reason: str):
        self.name = name
        self.reason = Missing(reason)

    def unsupported_reason(self, problem: Problem) -> Missing:
        return self.reason

    def forward(self, *args):
        raise NotImplementedError(f'implementation "{self.name}" cannot run: {self.reason}')

    backward = forward


def _of_module(name: str) -> Implementation:
    try:
        module = importlib.import_module(f".{name}", __package__)
    except ImportError as error:
        return Unavailable(name, f"its Python module does not import: {error}")
    return getattr(module, name.upper())


@lru_cache(maxsize=1)
def implementations() -> tuple[Implementation, ...]:
    """The table, fastest first. The last row is never chosen unless named."""
    from .tiled import TILED

    return (_of_module("sm90"), _of_module("sm80"), TILED, REFERENCE)


# Where the portable kernels are faster than the Hopper ones, whose blocks are made for two to four rows with the same
# pair bias and 128 queries: missing rows and queries cost as much as present ones. Measured when it was at most three.
SM90_MIN_ROWS = 3
SM90_MIN_QUERIES = 32


def slower_reason(name: str, problem: Problem) -> str | None:
    """Why `name` is not picked by itself for a problem that it can run: the part of the choice that was measured.

    None: nothing below it in the table is faster. A reason has no numbers of the problem in it, so that it is logged
    once and not for every size.
    """
    if name != "sm90":
        return None
    if problem.rows_sharing_bias < SM90_MIN_ROWS:
        return f"slower than sm80 below {SM90_MIN_ROWS} rows with the same pair bias"
    if problem.q_len < SM90_MIN_QUERIES:
        return f"slower than sm80 below {SM90_MIN_QUERIES} queries"
    return None


def _passed_over(entry: Implementation, problem: Problem) -> str | None:
    return entry.unsupported_reason(problem) or slower_reason(entry.name, problem)


def explain(problem: Problem) -> list[tuple[str, str | None]]:
    """(name, None or why it is passed over for `problem`) for every row of the table."""
    return [(entry.name, _passed_over(entry, problem)) for entry in implementations()]


_announced: set[tuple] = set()


def _announce(problem: Problem, chosen: str, refused: tuple[tuple[str, str], ...]) -> None:
    key = (problem.device_type, problem.capability, chosen, refused)
    if key in _announced:
        return
    _announced.add(key)
    device = problem.device_type
    if problem.capability is not None:
        device += " with compute capability {}.{}".format(*problem.capability)
    reasons = "".join(f"; not {name}: {reason}" for name, reason in refused)
    # One rank alone may lack the library, and lines below WARNING are shown for rank 0 only.
    lacking = problem.device_type == "cuda" and any(
        isinstance(reason, Missing) and slower_reason(name, problem) is None for name, reason in refused
    )
    _logging.attach_handler()  # `deepspeed_ds4sci.nn` comes here without a public name of the package
    logger.log(
        logging.WARNING if lacking else logging.INFO,
        'evoformer_attention on %s runs "%s"%s',
        *(device, chosen, reasons),
    )


def _named(problem: Problem, requested: str) -> Implementation:
    names = [entry.name for entry in implementations()]
    if requested not in names:
        raise ValueError(f"implementation must be None or one of {', '.join(names)}, got {requested!r}")
    entry = implementations()[names.index(requested)]
    reason = entry.unsupported_reason(problem)
    if reason is not None:
        raise NotImplementedError(f'implementation "{requested}" cannot run this problem: {reason}')
    return entry


@lru_cache(maxsize=4096)
def choose(problem: Problem, requested: str | None = None) -> Implementation:
    """The implementation that runs `problem`.

    Args:
        problem: sizes, dtype and device.
        requested: a name, honoured or refused; None for the fastest that can run, never "reference". A name runs
            also where another is faster.

    Raises:
        ValueError: `requested` is not a name in the table.
        NotImplementedError: the named implementation, or every implementation, cannot run `problem`; with the reasons.

    Decisions are kept per (problem, requested). The first of a kind writes one line to log "deepspeed_ds4sci": INFO,
    or WARNING where a CUDA device would run a faster one if its library were not missing.
    """
    if requested is not None:
        return _named(problem, requested)
    refused = []
    for entry in implementations()[:-1]:
        reason = _passed_over(entry, problem)
        if reason is None:
            _announce(problem, entry.name, tuple(refused))
            return entry
        refused.append((entry.name, reason))
    raise NotImplementedError(
        "no implementation can run this problem: " + "; ".join(f"{name}: {reason}" for name, reason in refused)
    )


def forget_choices() -> None:
    """Look at the table again, for instance after the compiled extension has been built in this process."""
    choose.cache_clear()
    implementations.cache_clear()
    _announced.clear()


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@lru_cache(maxsize=4096)
def _problem(
    q_shape: tuple[int, ...],
    k_len: int,
    dtype: torch.dtype,
    device: torch.device,
    pair_dtype: torch.dtype | None,
    pair_batch: int,
    softmax_scale: float,
) -> Problem:
    batch, rows, q_len, heads, head_dim = q_shape
    sizes = (batch, rows, q_len, k_len, heads, head_dim)
    return Problem(device.type, _capability(device), dtype, *sizes, pair_dtype, pair_batch, softmax_scale)


def problem_of(q: Tensor, k: Tensor, pair_bias: Tensor | None, softmax_scale: float) -> Problem:
    """The `Problem` of q [B, N, Lq, H, D], k [B, N, Lk, H, D] and pair_bias [B|1, 1, H|1, Lq, Lk] or None."""
    if pair_bias is None:
        return _problem(q.shape, k.shape[2], q.dtype, q.device, None, 1, softmax_scale)
    return _problem(q.shape, k.shape[2], q.dtype, q.device, pair_bias.dtype, pair_bias.shape[0], softmax_scale)

# SPDX-License-Identifier: Apache-2.0
"""What the benchmark asks of an implementation."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.benchmarks.case import Case, Inputs


@dataclass
class Call:
    """One implementation bound to one case's tensors, in its own layout.

    Attributes:
        forward: runs the op and returns its output.
        leaves: tensors to differentiate, by canonical name: "q", "k", "v" and, when wanted, "pair_bias" and "gate".
        grad_output: gradient of the output, in its layout.
        canonical: (name, tensor) -> view in the canonical layout; names are those of `leaves`, and "o".
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    grad_output: Tensor
    canonical: Callable[[str, Tensor], Tensor] = field(default=lambda name, tensor: tensor)


class Peer:
    """An implementation to measure. `name` is its column in the table."""

    name: str
    has_backward = True
    shares_pair_bias = False  # takes one pair bias for all samples; without it, samples are handed over as rows
    takes_gate = False  # can multiply its output by a sigmoid; without it, cases with a gate are not offered
    graph_reason: str | None = None  # why it cannot be captured in a CUDA graph; None: it can be tried

    def unavailable_reason(self, device_type: str) -> str | None:
        """Why it cannot run here at all (not installed, wrong device), or None."""
        return None

    def refused_reason(self, case: Case) -> str | None:
        """Why it does not offer this case, or None. What is not said here is tried, and its error is reported."""
        return None

    def bind(self, case: Case, inputs: Inputs) -> Call:
        """Copies the inputs into its layout. NotImplementedError, like `refused_reason`, declines the case."""
        raise NotImplementedError


def only_on_cuda(device_type: str) -> str | None:
    return None if device_type == "cuda" else "runs on CUDA only"


def leaf(tensor: Tensor) -> Tensor:
    """A contiguous copy that requires a gradient."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def wanted_leaves(case: Case, q: Tensor, k: Tensor, v: Tensor, pair_bias: Tensor | None) -> dict[str, Tensor]:
    """The tensors whose gradients the case asks for; turns the others' gradient off."""
    leaves = {"q": q, "k": k, "v": v}
    if pair_bias is not None:
        if case.pair_grad:
            leaves["pair_bias"] = pair_bias
        else:
            pair_bias.requires_grad_(False)
    return leaves

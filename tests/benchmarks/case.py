# SPDX-License-Identifier: Apache-2.0
"""What is measured: one shape in one dtype, and its random inputs.

Axes: B batch, N rows, L attended length (Lq queries, Lk keys), H heads, D head dim.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.helpers.shapes import AttentionShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MASK_VALUE = -1e9  # added to a dropped key, as AlphaFold's code does
DROPPED = 0.1  # share of keys that the random mask drops


@dataclass(frozen=True)
class Case:
    """One line of the benchmark: a named shape (tests/helpers/shapes.py) with everything else that time depends on."""

    name: str
    batch: int
    rows: int
    q_len: int
    k_len: int
    heads: int
    head_dim: int
    pair: bool  # has a pair bias
    shared_pair: bool  # one pair bias for all samples of the batch
    source: str
    dtype: str = "bf16"
    mask: str = "random"  # or "none"
    pair_grad: bool = True
    gate: bool = False  # the output is multiplied by the sigmoid of a tensor of its shape

    @classmethod
    def of(cls, shape: AttentionShape, dtype: str, mask: str, pair_grad: bool, gate: bool = False) -> "Case":
        sizes = (shape.batch, shape.rows, shape.q_len, shape.k_len, shape.heads, shape.head_dim)
        return cls(shape.name, *sizes, shape.pair, shape.shared_pair, shape.source, dtype, mask, pair_grad, gate)

    @property
    def logits(self) -> int:
        """Number of query-key products: B * N * H * Lq * Lk."""
        return self.batch * self.rows * self.heads * self.q_len * self.k_len

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def flops(self, which: str) -> float:
        """Operations of the matrix products: two per logit and head dim forward ("fwd"), five more backward."""
        products = {"fwd": 2, "fwd+bwd": 7}[which]
        return 2.0 * products * self.logits * self.head_dim


@dataclass
class Inputs:
    """Canonical tensors of a case; a peer copies them into its own layout.

    q [B, N, Lq, H, D]; k, v [B, N, Lk, H, D]; keep: bool [B, N, Lk] or None; pair_bias: [B, 1, H, Lq, Lk] ([1, 1,
    H, Lq, Lk] where samples share it) or None; do [B, N, Lq, H, D]: the gradient of the output; gate: [B, N, Lq, H, D]
    or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor | None
    pair_bias: Tensor | None
    do: Tensor
    gate: Tensor | None = None

    def mask_bias(self) -> Tensor | None:
        """[B, N, 1, 1, Lk] in q's dtype: 0 to keep, MASK_VALUE to drop."""
        return None if self.keep is None else additive_mask(self.keep, self.q.dtype)[:, :, None, None, :]


def additive_mask(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `keep`, MASK_VALUE (the dtype's lowest value if that is above) elsewhere; same shape."""
    additive = torch.zeros(keep.shape, dtype=dtype, device=keep.device)
    return additive.masked_fill_(~keep, max(MASK_VALUE, torch.finfo(dtype).min))


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random inputs: standard normal, the same for every peer."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)

    batch, rows, heads, dim = case.batch, case.rows, case.heads, case.head_dim
    q = normal(batch, rows, case.q_len, heads, dim)
    k, v = (normal(batch, rows, case.k_len, heads, dim) for _ in range(2))
    pair_batch = 1 if case.shared_pair else batch
    pair_bias = normal(pair_batch, 1, heads, case.q_len, case.k_len) if case.pair else None
    keep = None
    if case.mask == "random":
        keep = torch.rand(batch, rows, case.k_len, generator=generator, device=device) >= DROPPED
        keep[..., 0] = True  # a row without any key means something else to every peer
    do = normal(batch, rows, case.q_len, heads, dim)
    return Inputs(q, k, v, keep, pair_bias, do, normal(*do.shape) if case.gate else None)


def with_samples_as_rows(case: Case, inputs: Inputs) -> tuple[Case, Inputs]:
    """The same problem with B = 1, if the samples share their pair bias; else as it is.

    The best form for kernels that know a pair bias shared over rows but not over samples.
    """
    if not case.shared_pair or case.batch == 1:
        return case, inputs
    q, k, v, do = (x.flatten(0, 1)[None] for x in (inputs.q, inputs.k, inputs.v, inputs.do))
    keep, gate = (None if x is None else x.flatten(0, 1)[None] for x in (inputs.keep, inputs.gate))
    return replace(case, batch=1, rows=case.batch * case.rows), Inputs(q, k, v, keep, inputs.pair_bias, do, gate)

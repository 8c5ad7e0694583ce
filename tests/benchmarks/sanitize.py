# SPDX-License-Identifier: Apache-2.0
"""Small shapes through every CUDA kernel, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.benchmarks.sanitize

Caching is turned off so that each tensor is an allocation of its own, whose ends the sanitizer knows. Inputs are made
on the CPU: a sanitizer slows every kernel down, also those that only prepare. Each implementation runs the cases that
it takes.
"""

import argparse
import contextlib
import itertools
import os
import sys
from dataclasses import dataclass

import torch

from deepspeed_ds4sci import evoformer_attention
from deepspeed_ds4sci.ops._dispatch import choose, problem_of

IMPLEMENTATIONS = ("sm90", "sm80")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (8, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Small:
    """A reduced case: lengths off the tile sizes on purpose."""

    batch: int = 1
    rows: int = 2
    q_len: int = 70
    k_len: int = 70
    heads: int = 2
    head_dim: int = 32
    mask: str = "float"  # "float" (with its gradient), "bool" or "none"
    pair: str = "full"  # "full", "heads" (broadcast over H) or "none"
    bias_dtype: torch.dtype | None = None  # None: that of q
    layout: str = "plain"  # "plain", "ending" (transposed view) or "packed" (slices of one projection)
    gate: bool = False
    unlucky: bool = False  # the largest pair bias is dropped by the mask: no reference for the softmax


VARIANTS = (
    Small(mask="none", pair="none"),
    Small(mask="bool", pair="none"),
    Small(mask="none"),
    Small(mask="bool", pair="heads"),
    Small(bias_dtype=torch.float32),
    Small(rows=1),
    Small(rows=1, head_dim=16),
    Small(rows=3, head_dim=16),
    Small(rows=1, q_len=1, k_len=129),
    Small(rows=3, q_len=129, k_len=17),
    Small(batch=2, rows=5, q_len=64, k_len=64),
    Small(rows=70, layout="ending"),
    Small(layout="packed"),
    Small(rows=9, q_len=193, k_len=193),
    Small(rows=4, head_dim=64, q_len=130, k_len=200),
    Small(rows=4, unlucky=True),
    Small(rows=3, q_len=129, gate=True),
    Small(rows=70, head_dim=24, layout="ending", gate=True),
    Small(rows=4, head_dim=64, mask="bool", unlucky=True, gate=True),
    # more work items per block than buffers of operands
    Small(rows=420, q_len=17, k_len=17),
    Small(rows=420, q_len=17, k_len=17, pair="none"),
    Small(rows=420, q_len=17, k_len=17, head_dim=64),
    Small(rows=420, q_len=17, k_len=17, head_dim=64, pair="none", mask="bool"),
    # dQ, dK and dV at once: enough items, three and four warpgroups, one pass over the keys and more
    Small(rows=13, heads=10, k_len=180),
    Small(rows=26, heads=10, k_len=250, q_len=70),
    Small(rows=13, heads=10, k_len=321, head_dim=16),
    Small(rows=26, heads=10, k_len=500, q_len=70, pair="none"),
    Small(rows=66, heads=10, k_len=330, q_len=40, head_dim=64),
    # d(pair_bias) from factored sums, which takes 2^27 logits
    Small(rows=130, heads=4, q_len=510, k_len=510),
    Small(rows=130, heads=4, q_len=510, k_len=510, head_dim=64, unlucky=True),
)


def cases() -> list[tuple[torch.dtype, Small]]:
    """Every dtype with every head dim once, then every variant in every dtype."""
    grid = [(dtype, Small(head_dim=dim)) for dtype, dim in itertools.product(DTYPES, HEAD_DIMS)]
    return grid + list(itertools.product(DTYPES, VARIANTS))


def _qkv(small: Small, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    lengths = (small.q_len, small.k_len, small.k_len)
    if small.layout == "packed":
        width = 3 * small.head_dim
        packed = torch.randn(small.batch, small.rows, small.q_len, small.heads, width).to(device, dtype)
        return [part.requires_grad_() for part in packed.detach().split(small.head_dim, dim=-1)]
    if small.layout == "ending":
        shapes = [(small.batch, length, small.rows, small.heads, small.head_dim) for length in lengths]
        return [torch.randn(shape).to(device, dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    shapes = [(small.batch, small.rows, length, small.heads, small.head_dim) for length in lengths]
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def run(dtype: torch.dtype, small: Small, implementation: str, device: str) -> bool:
    """Forward and backward of one case; False if the implementation does not take it.

    RuntimeError if a result is not finite.
    """
    torch.manual_seed(0)
    q, k, v = _qkv(small, dtype, device)
    keep = torch.rand(small.batch, small.rows, 1, 1, small.k_len) > 0.2
    keep[:, 0] = False  # a row without any key
    if small.unlucky:
        keep[..., -1] = False
    bias_dtype = small.bias_dtype or dtype
    mask_bias = None
    if small.mask == "bool":
        mask_bias = keep.to(device)
    elif small.mask == "float":
        mask_bias = torch.where(keep, 0.0, -torch.inf).to(device, bias_dtype).requires_grad_()
    pair_bias = None
    if small.pair != "none":
        heads = small.heads if small.pair == "full" else 1
        pair_bias = torch.randn(small.batch, 1, heads, small.q_len, small.k_len)
        if small.unlucky:
            pair_bias[..., -1] = 200.0
        pair_bias = pair_bias.to(device, bias_dtype).requires_grad_()
    gate = torch.randn(q.shape).to(device, dtype).requires_grad_() if small.gate else None
    try:
        choose(problem_of(q, k, pair_bias, small.head_dim**-0.5), implementation)
    except NotImplementedError:
        return False
    o = evoformer_attention(
        q, k, v, mask_bias=mask_bias, pair_bias=pair_bias, gate=gate, implementation=implementation
    )
    wanted = [x for x in (q, k, v, mask_bias, pair_bias, gate) if x is not None and x.requires_grad]
    results = torch.autograd.grad(o, wanted, torch.randn(o.shape).to(device, dtype))
    for result in (o, *results):
        if not torch.isfinite(result.detach().cpu()).all():
            raise RuntimeError(f"a result is not finite: {dtype}, {small}")
    return True


@contextlib.contextmanager
def filled_outputs():
    """Results, which the op allocates in the form of an input, start as zeros; workspaces and statistics do not."""
    empty_like = torch.empty_like
    torch.empty_like = torch.zeros_like
    try:
        yield
    finally:
        torch.empty_like = empty_like


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", help=f"implementations with commas (default: {', '.join(IMPLEMENTATIONS)})")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="every fourth case")
    parser.add_argument("--matching", default="", metavar="TEXT", help='cases that contain it, such as "head_dim=16"')
    parser.add_argument("--fill-outputs", action="store_true", help="for initcheck; see above")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        print("warning: errors inside torch's pool go unseen; set PYTORCH_NO_CUDA_MEMORY_CACHING=1", file=sys.stderr)
    chosen = [case for case in cases()[:: 4 if options.quick else 1] if options.matching in str(case[1])]
    if not chosen:
        parser.error(f"--matching: no case contains {options.matching!r}; they look like {cases()[0][1]}")
    with filled_outputs() if options.fill_outputs else contextlib.nullcontext():
        run_all(options, chosen)


def run_all(options: argparse.Namespace, chosen: list) -> None:
    """The chosen cases by every implementation that takes them."""
    total = 0
    for name in options.impl.split(",") if options.impl else IMPLEMENTATIONS:
        ran = sum(run(dtype, small, name, options.device) for dtype, small in chosen)
        print(f"{name}: {ran} of {len(chosen)} cases ran")
        if ran == 0 and options.impl:
            raise SystemExit(f"{name} takes none of the cases on {options.device}")
        total += ran
    if total == 0:
        raise SystemExit(f"none of {', '.join(IMPLEMENTATIONS)} takes any case on {options.device}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Named shapes with their source: the one list that tests and benchmarks draw from.

Axes: B batch, N rows, L attended length (Lq queries, Lk keys), H heads, D head dim.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One problem. `pair` says whether the use behind it has a pair bias; `shared_pair` whether samples share it."""

    name: str
    batch: int
    rows: int
    q_len: int
    k_len: int
    heads: int
    head_dim: int
    source: str
    pair: bool = True
    shared_pair: bool = False

    @property
    def logits(self) -> int:
        return self.batch * self.rows * self.heads * self.q_len * self.k_len

    def __str__(self) -> str:
        return self.name


def _square(
    name: str, batch: int, rows: int, seq_len: int, heads: int, head_dim: int, source: str, **flags
) -> AttentionShape:
    return AttentionShape(name, batch, rows, seq_len, seq_len, heads, head_dim, source, **flags)


def _triangle(seq_len: int, head_dim: int = 32, source: str = "AlphaFold 2 pair stack") -> AttentionShape:
    suffix = "" if head_dim == 32 else f"-D{head_dim}"
    return _square(f"triangle-{seq_len}{suffix}", 1, seq_len, seq_len, 4, head_dim, source)


# Shapes people run, by use.
USES: tuple[AttentionShape, ...] = (
    _square("msa-row-initial", 1, 128, 256, 8, 32, "AlphaFold 2, initial training"),
    _square("msa-row", 1, 512, 384, 8, 32, "AlphaFold 2, fine-tuning"),
    _square("extra-msa-row-initial", 1, 1024, 256, 8, 8, "AlphaFold 2, initial training"),
    _square("extra-msa-row", 1, 5120, 384, 8, 8, "AlphaFold 2, fine-tuning"),
    _square("msa-column", 1, 384, 512, 8, 32, "AlphaFold 2, fine-tuning", pair=False),
    _square("long-msa", 1, 384, 5120, 8, 32, "AlphaFold 2, inference on a long sequence or deep MSA"),
    _triangle(256, source="AlphaFold 2, initial training"),
    _triangle(384, source="AlphaFold 2, fine-tuning"),
    _triangle(512, source="measured side by side with other kernels"),
    _triangle(640, source="AlphaFold 3, training crop"),
    _triangle(768, source="AlphaFold 3, fine-tuning crop"),
    _triangle(1024, source="inference"),
    _triangle(2048, source="inference"),
    _triangle(4096, source="inference"),
    _triangle(511, source="a length that is no multiple of anything"),
    _triangle(768, 64, source="triangle attention with 64-wide heads"),
    _square("template-256", 1, 256, 256, 4, 16, "OpenFold, template pair stack"),
    _square("template-256-D64", 1, 256, 256, 4, 64, "template pair stack with 64-wide heads"),
    _square("pairformer-768", 1, 1, 768, 16, 24, "AlphaFold 3, AttentionPairBias"),
    _square("diffusion-384", 48, 1, 384, 16, 48, "AlphaFold 3, diffusion transformer", shared_pair=True),
    _square("diffusion-768", 48, 1, 768, 16, 48, "AlphaFold 3, diffusion transformer", shared_pair=True),
    _square("deepspeed-test-256", 1, 256, 256, 4, 32, "DeepSpeed's unit test of the op"),
    _square("deepspeed-test-512", 1, 512, 256, 8, 8, "DeepSpeed's unit test of the op"),
)

BY_NAME: dict[str, AttentionShape] = {shape.name: shape for shape in USES}

# The rows of the table of timing bars, in its order.
BARS: tuple[AttentionShape, ...] = tuple(
    BY_NAME[name]
    for name in (
        "triangle-256",
        "triangle-512",
        "triangle-1024",
        "triangle-2048",
        "msa-row",
        "msa-column",
        "extra-msa-row",
        "triangle-768-D64",
        "diffusion-768",
    )
)

# Triangle attention by length.
LENGTHS: tuple[AttentionShape, ...] = tuple(
    BY_NAME.get(f"triangle-{length}") or _triangle(length, source="time against length")
    for length in (256, 384, 512, 768, 1024, 2048, 3072, 4096)
)

# Lengths that fill no tile, each followed by the next multiple of 64.
TAILS: tuple[AttentionShape, ...] = tuple(
    BY_NAME.get(f"triangle-{length}") or _triangle(length, source="what a tail costs")
    for length in (511, 512, 1000, 1024, 1217, 1280)
)

# The same uses, small enough for a CPU.
SMALL_USES: tuple[AttentionShape, ...] = (
    _square("small-msa-row", 1, 12, 48, 8, 32, "msa-row"),
    _square("small-extra-msa-row", 1, 40, 32, 8, 8, "extra-msa-row"),
    _square("small-msa-column", 1, 24, 40, 8, 32, "msa-column", pair=False),
    _square("small-triangle", 1, 64, 64, 4, 32, "triangle"),
    _square("small-template", 2, 20, 20, 4, 16, "template-256"),
    _square("small-pairformer", 1, 1, 96, 16, 24, "pairformer-768"),
    _square("small-diffusion", 6, 1, 64, 16, 48, "diffusion-768", shared_pair=True),
)

# Lengths at and around tile edges.
BOUNDARY_LENGTHS: tuple[int, ...] = (
    1,
    7,
    8,
    15,
    16,
    17,
    31,
    33,
    63,
    64,
    65,
    96,
    100,
    127,
    128,
    129,
    191,
    192,
    229,
    255,
    256,
    257,
    383,
    384,
    511,
    513,
    1000,
    1024,
    2047,
    5000,
)
UNEQUAL_LENGTHS: tuple[tuple[int, int], ...] = ((1, 513), (513, 1), (64, 1000))
BOUNDARY_ROWS: tuple[int, ...] = (1, 2, 3, 4, 5, 7, 128, 513)
BOUNDARY_BATCHES: tuple[int, ...] = (1, 2, 3)
BOUNDARY_HEADS: tuple[int, ...] = (1, 2, 3, 4, 8, 16)
HEAD_DIMS: tuple[int, ...] = (8, 16, 24, 32, 48, 64, 96, 128)
ODD_HEAD_DIMS: tuple[int, ...] = (1, 5, 33, 127)


def _boundary_rows() -> tuple[AttentionShape, ...]:
    """One axis off its usual value at a time: rows chosen for a reason, not the full product."""
    source = "boundary list"
    shapes = [_square(f"L{length}", 1, 3, length, 2, 32, source) for length in BOUNDARY_LENGTHS]
    shapes += [
        AttentionShape(f"Lq{q_len}-Lk{k_len}", 2, 3, q_len, k_len, 2, 32, source) for q_len, k_len in UNEQUAL_LENGTHS
    ]
    shapes += [_square(f"N{rows}", 1, rows, 33, 2, 16, source) for rows in BOUNDARY_ROWS]
    shapes += [_square(f"B{batch}", batch, 3, 65, 2, 32, source) for batch in BOUNDARY_BATCHES]
    shapes += [_square(f"H{heads}", 2, 3, 40, heads, 16, source) for heads in BOUNDARY_HEADS]
    shapes += [_square(f"D{head_dim}", 1, 5, 72, 2, head_dim, source) for head_dim in HEAD_DIMS + ODD_HEAD_DIMS]
    return tuple(shapes)


BOUNDARY: tuple[AttentionShape, ...] = _boundary_rows()

# More work items per block of a large GPU than there are buffers for their operands; dQ of the second is computed by
# a kernel of its own.
MANY_ITEMS: tuple[AttentionShape, ...] = (
    AttentionShape("items-D64", 1, 96, 200, 200, 4, 64, "buffers are handed back"),
    AttentionShape("items-D32", 1, 200, 130, 100, 4, 32, "buffers are handed back"),
)

# B * N * H above 65,535 (a grid axis that is not x stops there), and more than 2^31 elements in q.
MANY_ROWS = _square("BNH-above-65535", 2, 4200, 16, 8, 8, "size limits")
LARGE_TENSOR = _square("elements-above-2^31", 1, 4200, 4096, 4, 32, "size limits")

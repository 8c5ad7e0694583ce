# SPDX-License-Identifier: Apache-2.0
"""Attention cases shared by the tests on one rank and on several."""

import torch


def block_rule(batch, head, query, key):
    """Odd heads see their own key and every third one, by query and sample; even heads see all."""
    return ((query + key + batch) % 3 == 0) | (query == key) | (head % 2 == 0)


def case_arguments(name: str, batch: int, seq_len: int, heads: int) -> dict:
    """Keyword arguments of attention for a named case, for the whole sequence."""
    generator = torch.Generator().manual_seed(5)
    slopes = torch.rand(heads, generator=generator)
    documents = torch.arange(seq_len).mul(3).div(seq_len, rounding_mode="floor").repeat(batch, 1)
    documents[-1] = (torch.arange(seq_len) >= seq_len // 5).long()
    padded = documents.clone()
    padded[:, -(seq_len // 6 + 1) :] = -1
    keep = torch.rand(batch, heads, seq_len, seq_len, generator=generator) < 0.4
    keep[:, :, 2] = False  # a query without keys
    bias = torch.randn(1, heads, seq_len, seq_len, generator=generator)
    return {
        "causal": dict(causal=True),
        "bidirectional": dict(causal=False),
        "alibi": dict(causal=True, alibi_slopes=slopes),
        "alibi_bidirectional": dict(causal=False, alibi_slopes=slopes),
        "window": dict(causal=True, window=5),
        "window_bidirectional": dict(causal=False, window=4),
        "window_pair": dict(causal=False, window=(3, -1)),
        "documents": dict(causal=True, document_ids=documents),
        "documents_bidirectional": dict(causal=False, document_ids=documents),
        "padding": dict(causal=False, document_ids=padded),
        "mask": dict(causal=False, mask=keep),
        "mask_of_keys": dict(causal=True, mask=keep[:, :1, 3:4]),
        "float_mask": dict(causal=True, mask=bias),
        "mask_rule": dict(causal=False, mask=block_rule),
        "scale": dict(causal=True, scale=0.3),
        "everything": dict(causal=True, alibi_slopes=slopes, window=9, document_ids=padded, mask=block_rule),
    }[name]


CASES = [
    "causal",
    "bidirectional",
    "alibi",
    "alibi_bidirectional",
    "window",
    "window_bidirectional",
    "window_pair",
    "documents",
    "documents_bidirectional",
    "padding",
    "mask",
    "mask_of_keys",
    "float_mask",
    "mask_rule",
    "scale",
    "everything",
]


def make_qkv(batch, seq_len, heads, groups, head_dim, dtype=torch.float32, seed=0):
    """Random q, k, v and output gradient; the same for every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, seq_len, n, head_dim) for n in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]

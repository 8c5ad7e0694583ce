# SPDX-License-Identifier: Apache-2.0
"""Attention with every mask and bias, written element by element from the words of the docstrings."""

import math

import torch


def naive_attention(q, k, v, *, causal, mask=None, alibi_slopes=None, window=None, document_ids=None, scale=None):
    """q [B, S, H, D], k, v [B, S, G, D] -> [B, S, H, D]. `mask`: [B, H, S, S] float bias or bool, or a function."""
    batch, seq_len, heads, head_dim = q.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    repeat = heads // k.shape[2]
    bias = torch.zeros(batch, heads, seq_len, seq_len, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for i in range(seq_len):
                for j in range(seq_len):
                    bias[b, h, i, j] = _bias(b, h, i, j, causal, mask, alibi_slopes, window, document_ids)
    outputs = []
    for h in range(heads):
        key, value = k[:, :, h // repeat], v[:, :, h // repeat]
        scores = torch.einsum("bid,bjd->bij", q[:, :, h], key) * scale + bias[:, h]
        visible = (bias[:, h] > -math.inf).any(-1, keepdim=True)
        weights = torch.where(visible, scores, 0.0).softmax(-1) * visible
        outputs.append(torch.einsum("bij,bjd->bid", weights, value))
    return torch.stack(outputs, 2)


def _bias(b, h, i, j, causal, mask, alibi_slopes, window, document_ids):
    if causal and j > i:
        return -math.inf
    if isinstance(window, int) and abs(i - j) >= window:
        return -math.inf
    if isinstance(window, tuple) and (0 <= window[0] < i - j or 0 <= window[1] < j - i):
        return -math.inf
    if document_ids is not None and (document_ids[b, i] != document_ids[b, j] or document_ids[b, i] < 0):
        return -math.inf
    bias = 0.0 if alibi_slopes is None else -float(alibi_slopes[h]) * abs(i - j)
    if callable(mask):
        return bias if bool(mask(*(torch.tensor(x) for x in (b, h, i, j)))) else -math.inf
    if mask is not None:
        element = mask[min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1), min(i, mask.shape[2] - 1), j]
        if mask.dtype != torch.bool:
            return bias + float(element)
        return bias if bool(element) else -math.inf
    return bias

# SPDX-License-Identifier: Apache-2.0
"""Attention on one rank that holds all tokens of its heads, by a named implementation.

| name | runs | masks and biases |
|---|---|---|
| tiled | this package, any device and dtype | all; memory grows with the tile, not with S^2 |
| math, efficient | torch SDPA with that backend | all, as one explicit [B|1, H|1, S, S] tensor; dropout: math only |
| flash, cudnn | torch SDPA with that backend (flash is FlashAttention-2) | causal only |
| flex | torch flex_attention, compiled on a GPU; no backward on the CPU | all but float masks and dropout |
| flash_attn | the flash_attn package, v1 or v2 interface | causal; v2 also window and ALiBi |
| flash_attn_4 | the flash-attn-4 package, on Hopper and Blackwell in 16 bits | causal, window |

A named implementation is honoured or refused with the reason; "auto" picks SDPA for plain or causal attention without
dropout and "tiled" for the rest. It never picks flash_attn_4, which is faster than torch's own on Hopper: the package
is a beta, functions of it are called that may change, and it compiles for seconds at first use. A config names it.
"""

import importlib
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepspeed_ds4sci.sequence import flash_attn_4
from deepspeed_ds4sci.sequence.blocks import BlockKernel
from deepspeed_ds4sci.sequence.kept import keeps_flash_attn
from deepspeed_ds4sci.sequence.ring import ring_attention
from deepspeed_ds4sci.sequence.scores import ScoreRules

IMPLEMENTATIONS = ("auto", "tiled", "math", "efficient", "flash", "cudnn", "flex", "flash_attn", "flash_attn_4")

_SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def unsupported_reason(implementation: str, rules: ScoreRules) -> str | None:
    """Why an implementation cannot compute these rules; None: it can."""
    needs = _features(rules)
    accepted = {
        "auto": needs,
        "tiled": needs,
        "math": needs,
        "efficient": needs - {"dropout"},
        "flash": {"causal"},
        "cudnn": {"causal"},
        "flex": needs - {"float mask", "dropout"},
        "flash_attn": {"causal", "window", "alibi"} if _flash_attn_v2() else {"causal"},
        "flash_attn_4": flash_attn_4.FEATURES,
    }[implementation]
    refused = sorted(needs - accepted)
    if refused:
        return f'"{implementation}" does not support {", ".join(refused)}; "tiled" does'
    return unavailable_reason(implementation, "") if implementation == "flash_attn" else None


def unavailable_reason(implementation: str, device_type: str) -> str | None:
    """Why an implementation cannot train on this kind of device ("cpu", "cuda"); None: it can."""
    if implementation == "flash_attn_4":
        return flash_attn_4.unavailable_reason(device_type)
    if implementation == "flash_attn" and not _flash_attn():
        return 'the package flash_attn cannot be imported; "flash" is FlashAttention-2 as torch ships it'
    if device_type == "cpu" and implementation in ("efficient", "cudnn", "flash_attn"):
        return f'"{implementation}" needs a CUDA GPU; "flash", "math" and "tiled" work on the CPU'
    if device_type == "cpu" and implementation == "flex":
        return '"flex" has no backward pass on the CPU; "tiled" takes the same masks'
    return None


def unkept_reason(implementation: str) -> str | None:
    """Why recomputation cannot take over what an implementation returned (see `kept`); None: it can.

    Of flash_attn only the installed package can tell; where there is none, nothing is said.
    """
    if implementation == "math":
        return '"math" is many operations of torch, none of which is attention'
    if implementation == "flex":
        return 'the compiled kernel of "flex" is no operation of torch'
    if implementation == "flash_attn" and _flash_attn() and not keeps_flash_attn():
        return "the installed flash_attn registers no operation of torch, as newer versions do"
    return None


def local_attention(q, k, v, rules: ScoreRules, implementation: str = "auto") -> torch.Tensor:
    """Attention of q [B, S, H, D] to k, v [B, S, G, D], H a multiple of G -> [B, S, H, D], dtype of q.

    Head dims that a kernel does not take are padded with zeros inside; the scale stays that of `rules`.

    Raises:
        NotImplementedError: the named implementation cannot compute these rules.
    """
    reason = unsupported_reason(implementation, rules)
    if reason is not None:
        raise NotImplementedError(f"attention implementation {reason}")
    plain = rules.only_causal_or_nothing()
    if implementation == "tiled" or (implementation == "auto" and not plain):
        return ring_attention(q, k, v, rules, [((0, q.shape[1]),)], None, BlockKernel(fused=False))
    if implementation == "flash_attn_4":  # pads by itself
        return flash_attn_4.attention(q, k, v, rules)
    head_dim = q.shape[-1]
    q, k, v = (F.pad(x, (0, -head_dim % 8)) if head_dim % 8 else x for x in (q, k, v))
    run = {"flex": _flex, "flash_attn": _flash_attn_package}.get(implementation, _sdpa)
    return run(q, k, v, rules, implementation)[..., :head_dim]


def _features(rules: ScoreRules) -> set[str]:
    float_mask = rules.mask is not None and rules.mask.dtype != torch.bool
    present = {
        "causal": rules.right == 0,
        "window": rules.left is not None or rules.right not in (None, 0),
        "alibi": rules.slopes is not None,
        "document ids": rules.documents is not None,
        "float mask": float_mask,
        "mask": rules.mask is not None and not float_mask,
        "mask rule": rules.mask_rule is not None,
        "dropout": rules.dropout_p > 0,
    }
    return {name for name, used in present.items() if used}


def _sdpa(q, k, v, rules, implementation):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    bias, visible = None, None
    if not rules.only_causal_or_nothing():
        seq_len = q.shape[2]
        bias = rules.bias(q.detach(), ((0, seq_len),), (0, seq_len))
        visible = (bias > float("-inf")).any(-1, keepdim=True)
        # Backends differ on rows without keys; such a row sees all keys here and is set to 0 below.
        bias = bias.masked_fill_(~visible, 0.0)
    if rules.dropout_p:
        output = _math_with_dropout(q, k, v, bias, rules)
    else:
        # No name: torch picks. Named "flash" on the CPU is its own flash kernel.
        backends = _SDPA_BACKENDS.get(implementation, list(_SDPA_BACKENDS.values()))
        with sdpa_kernel(backends):
            output = F.scaled_dot_product_attention(
                q, k, v, bias, is_causal=bias is None and rules.right == 0, scale=rules.scale
            )
    if visible is not None:
        output = torch.where(visible, output, 0.0)
    return output.transpose(1, 2)


def _math_with_dropout(q, k, v, bias, rules):
    """The definition, with the dropout that depends on position only."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(dtype) @ k.to(dtype).mT) * rules.scale + bias
    weights = scores.softmax(-1)
    whole = (0, q.shape[2])
    return (weights * rules.dropout_factor(weights.detach(), whole, whole)).to(q.dtype) @ v


def _flex(q, k, v, rules, _):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, seq_len, heads, _ = q.shape

    def keep(b, h, query, key):
        kept = query >= 0
        if rules.left is not None:
            kept = kept & (query - key <= rules.left)
        if rules.right is not None:
            kept = kept & (key - query <= rules.right)
        if rules.documents is not None:
            kept = kept & (rules.documents[b, query] == rules.documents[b, key]) & (rules.documents[b, query] >= 0)
        if rules.mask is not None:
            one_batch, one_head, one_row, _ = (size == 1 for size in rules.mask.shape)
            zero = query * 0
            kept = (
                kept & rules.mask[zero if one_batch else b, zero if one_head else h, zero if one_row else query, key]
            )
        if rules.mask_rule is not None:
            kept = kept & rules.mask_rule(b, rules.real_head(h + rules.first_head), query, key)
        return kept

    def score(value, b, h, query, key):
        return value - rules.slopes[h] * (query - key).abs()

    given = [x.shape[0] for x in (rules.documents, rules.mask) if x is not None]
    by_batch = rules.mask_rule is not None or max(given, default=1) > 1
    by_head = rules.mask_rule is not None or (rules.mask is not None and rules.mask.shape[1] > 1)
    # Uncompiled, both would form [S, S] tensors.
    make_block_mask = _compiled(create_block_mask) if q.is_cuda else create_block_mask
    attend = _compiled(flex_attention) if q.is_cuda else flex_attention
    block_mask = make_block_mask(
        keep, batch if by_batch else None, heads if by_head else None, seq_len, seq_len, device=q.device
    )
    output = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=None if rules.slopes is None else score,
        block_mask=block_mask,
        scale=rules.scale,
        enable_gqa=k.shape[2] != heads,
    )
    return output.transpose(1, 2)


@cache
def _compiled(function):
    return torch.compile(function)


def _flash_attn():
    try:
        return importlib.import_module("flash_attn.flash_attn_interface")
    except ImportError:
        return None


def _flash_attn_v2() -> bool:
    return hasattr(_flash_attn(), "flash_attn_func")


def _flash_attn_package(q, k, v, rules, _):
    package = _flash_attn()
    causal = rules.right == 0
    if _flash_attn_v2():
        window = tuple(-1 if side is None else side for side in (rules.left, rules.right))
        slopes = None if rules.slopes is None else rules.slopes.float()
        return package.flash_attn_func(
            q,
            k,
            v,
            dropout_p=rules.dropout_p,
            softmax_scale=rules.scale,
            causal=causal,
            window_size=(window[0], -1 if causal else window[1]),
            alibi_slopes=slopes,
        )
    # Version 1 takes packed tokens with cumulative lengths and has no grouped heads.
    batch, seq_len, heads, _ = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    lengths = torch.arange(0, (batch + 1) * seq_len, seq_len, dtype=torch.int32, device=q.device)
    output = package.flash_attn_unpadded_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        lengths,
        lengths,
        seq_len,
        seq_len,
        rules.dropout_p,
        softmax_scale=rules.scale,
        causal=causal,
    )
    return output.unflatten(0, (batch, seq_len))

# SPDX-License-Identifier: Apache-2.0
"""Attention by the package flash-attn-4, made for Hopper and Blackwell; Python's `flash_attn.cute`.

The package's own differentiable function cannot be kept by recomputation (see `kept`), so its forward and its backward
pass are called here, which it names with an underscore: what they must take is checked before they are used.

It shares the folder `flash_attn` with the older package of that name, which has `flash_attn.flash_attn_interface`.

Version 4.0.0b36 returns wrong gradients on Hopper, without a word, for head dims up to 128 of which the next multiple
of 16 is none of 32, such as 80 and 112: those are padded. As it does not tell, its gradients are compared with the
definition's once for each kind of input, at a length of several blocks. What is compiled for that is what training
uses; sequences of a block or less may have kernels of their own, which are not compared.
"""

import importlib
import inspect
from functools import cache

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from deepspeed_ds4sci.sequence.kept import kept
from deepspeed_ds4sci.sequence.scores import ScoreRules

FEATURES = {"causal", "window"}
"""What it computes, in the words of `local_attention`."""

_MODULE = "flash_attn.cute.interface"
_MASK = {"softmax_scale", "causal", "window_size_left", "window_size_right"}
_ARGUMENTS = {
    "_flash_attn_fwd": {"q", "k", "v", "return_lse", *_MASK},
    "_flash_attn_bwd": {"q", "k", "v", "out", "dout", "lse", "deterministic", *_MASK},
}
_DTYPES = (torch.float16, torch.bfloat16)
_WRONG = 0.05  # error over norm; rounding in bf16 is 0.003
_CHECKED_TOKENS = 300  # several blocks of queries and of keys, the last one not full
_CHECKED_WINDOW = (90, 20)


def unavailable_reason(device_type: str) -> str | None:
    """Why it cannot train on this kind of device ("cpu", "cuda"); None: it can."""
    reason = _package()[1]
    if reason is not None:
        return reason
    if device_type == "cpu":
        return '"flash_attn_4" needs a CUDA GPU; "flash", "math" and "tiled" work on the CPU'
    return _unsuited_gpu(torch.cuda.current_device()) if torch.cuda.is_available() else None


def attention(q, k, v, rules: ScoreRules) -> torch.Tensor:
    """Attention of q [B, S, H, D] to k, v [B, S, G, D] -> [B, S, H, D]. Differentiable once.

    Its kernels are compiled for each dtype, head dim and kind of mask at first use, seconds each.

    Args:
        rules: scale, causality and window.

    Raises:
        NotImplementedError: no usable package; a GPU, dtype or head dim that it does not take or computes wrong
            gradients of.
    """
    reason = unavailable_reason(q.device.type) or _unsuited_inputs(q)
    head_dim = q.shape[-1]
    padding = _computed_head_dim(head_dim) - head_dim
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    if reason is None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        window = (rules.left is not None, rules.right if rules.right in (0, None) else 1)
        deterministic = torch.are_deterministic_algorithms_enabled()
        reason = _wrong_gradient(q.device, q.dtype, q.shape[-1], q.shape[2] // k.shape[2], window, deterministic)
    if reason is not None:
        raise NotImplementedError(f"attention implementation {reason}")
    return _Attention.apply(q, k, v, rules.scale, rules.left, rules.right)[..., :head_dim]


def _computed_head_dim(head_dim: int) -> int:
    """What a head is padded to: a multiple of 8, and see the module's head."""
    to_16 = -(-head_dim // 16) * 16
    return to_16 + 8 if to_16 % 32 and to_16 < 128 else -(-head_dim // 8) * 8


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, left, right):
        package, _ = _package()
        mask = dict(softmax_scale=scale, causal=right == 0, window_size_left=left, window_size_right=right)

        def compute():
            return tuple(package._flash_attn_fwd(q, k, v, return_lse=True, **mask)[:2])

        output, lse = kept("flash_attn_4", compute)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.mask = mask
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, output, lse = ctx.saved_tensors
        package, _ = _package()
        deterministic = torch.are_deterministic_algorithms_enabled()
        dq, dk, dv = package._flash_attn_bwd(
            q, k, v, output, do.contiguous(), lse, deterministic=deterministic, **ctx.mask
        )
        return dq, dk, dv, None, None, None


@cache
@torch.no_grad()
def _wrong_gradient(device, dtype, head_dim, heads_per_group, window, deterministic) -> str | None:
    """Which gradient of a small example is not the definition's; None: all are."""
    package, _ = _package()
    left = _CHECKED_WINDOW[0] if window[0] else None
    right = _CHECKED_WINDOW[1] if window[1] == 1 else window[1]
    generator = torch.Generator(device).manual_seed(0)  # training's own numbers go on
    shapes = [(1, _CHECKED_TOKENS, heads, head_dim) for heads in (2 * heads_per_group, 2, 2, 2 * heads_per_group)]
    q, k, v, do = (torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes)
    mask = dict(softmax_scale=head_dim**-0.5, causal=right == 0, window_size_left=left, window_size_right=right)
    output, lse = package._flash_attn_fwd(q, k, v, return_lse=True, **mask)[:2]
    found = package._flash_attn_bwd(q, k, v, output, do, lse, deterministic=deterministic, **mask)
    for name, ours, right_one in zip(("dq", "dk", "dv"), found, _gradients(q, k, v, do, left, right), strict=True):
        error = float((ours.double() - right_one).norm() / right_one.norm())
        if not error <= _WRONG:
            return (
                f'"flash_attn_4" computes a wrong {name} here (head dim {head_dim}, {heads_per_group} query heads per '
                f"key head, {dtype}): off by {error:.2f} of its norm; choose another one"
            )
    return None


def _gradients(q, k, v, do, left, right):
    """Of the definition, in fp64."""
    heads_per_group = q.shape[2] // k.shape[2]
    q, k, v, do = (x.double().transpose(1, 2) for x in (q, k, v, do))  # [B, H, S, D]
    k, v = (x.repeat_interleave(heads_per_group, 1) for x in (k, v))
    positions = torch.arange(q.shape[2], device=q.device)
    distance = positions[:, None] - positions
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        hidden |= distance > left
    if right is not None:
        hidden |= -distance > right
    scale = q.shape[-1] ** -0.5
    weights = (q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1)
    dweights = do @ v.mT
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (-1, heads_per_group)).sum(2) for x in (dscores.mT @ q, weights.mT @ do))
    return [x.transpose(1, 2) for x in (dscores @ k, dk, dv)]


def _package():
    """(module or None, why not or None)."""
    try:
        package = importlib.import_module(_MODULE)
    except Exception as error:  # its compiler looks for libraries and drivers and raises what it likes
        return None, (
            f'"flash_attn_4" needs the package flash-attn-4, which cannot be imported ({_first_line(error)}); '
            "pip install 'deepspeed_ds4sci[flash-attn-4]', with CUDA 13 'deepspeed_ds4sci[flash-attn-4-cu13]'"
        )
    missing = _missing_arguments(package)
    if missing:
        return None, (
            f'"flash_attn_4" is written for version 4.0.0b36 of the package flash-attn-4; in the one installed '
            f"{' and '.join(missing)}"
        )
    return package, None


@cache
def _missing_arguments(package) -> list[str]:
    found = []
    for name, needed in _ARGUMENTS.items():
        function = getattr(package, name, None)
        if function is None:
            found.append(f"{name} is missing")
        elif not needed <= inspect.signature(function).parameters.keys():
            lacking = needed - inspect.signature(function).parameters.keys()
            found.append(f"{name} does not take {', '.join(sorted(lacking))}")
    return found


def _unsuited_gpu(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if major in (9, 10):
        return None
    return (
        f'"flash_attn_4" is for GPUs of compute capability 9.0 and 10.x, got {major}.{minor}; "flash" is '
        "FlashAttention-2 as torch ships it"
    )


def _unsuited_inputs(q: torch.Tensor) -> str | None:
    if q.dtype not in _DTYPES:
        return f'"flash_attn_4" takes fp16 or bf16, got {q.dtype}'
    head_dim = q.shape[-1]
    if torch.cuda.get_device_capability(q.device)[0] == 9:
        return None if head_dim <= 256 else f'"flash_attn_4" takes a head dim of at most 256, got {head_dim}'
    if head_dim <= 128 or head_dim == 256:
        return None
    return f'"flash_attn_4" takes a head dim of at most 128, or 256, on this GPU, got {head_dim}'


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]

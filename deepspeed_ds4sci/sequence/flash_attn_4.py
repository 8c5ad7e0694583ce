# SPDX-License-Identifier: Apache-2.0
"""Attention by the package flash-attn-4, made for Hopper and Blackwell; Python's `flash_attn.cute`.

The package's own differentiable function cannot be kept by recomputation (see `kept`), so its forward and its backward
pass are called here, which it names with an underscore: what they must take is checked before they are used.

It shares the folder `flash_attn` with the older package of that name, which has `flash_attn.flash_attn_interface`.
"""

import importlib
import inspect
from functools import cache

import torch
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


def unavailable_reason(device_type: str) -> str | None:
    """Why it cannot train on this kind of device ("cpu", "cuda"); None: it can."""
    reason = _package()[1]
    if reason is not None:
        return reason
    if device_type == "cpu":
        return '"flash_attn_4" needs a CUDA GPU; "flash", "math" and "tiled" work on the CPU'
    return _unsuited_gpu(torch.cuda.current_device()) if torch.cuda.is_available() else None


def attention(q, k, v, rules: ScoreRules) -> torch.Tensor:
    """Attention of q [B, S, H, D] to k, v [B, S, G, D], D a multiple of 8 -> [B, S, H, D]. Differentiable once.

    Its kernels are compiled for each dtype, head dim and kind of mask at first use, seconds each.

    Args:
        rules: scale, causality and window.

    Raises:
        NotImplementedError: no usable package, a GPU, dtype or head dim that it does not take.
    """
    reason = unavailable_reason(q.device.type) or _unsuited_inputs(q)
    if reason is not None:
        raise NotImplementedError(f"attention implementation {reason}")
    return _Attention.apply(q, k, v, rules.scale, rules.left, rules.right)


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


def _package():
    """(module or None, why not or None)."""
    try:
        package = importlib.import_module(_MODULE)
    except Exception as error:  # its compiler looks for libraries and drivers and raises what it likes
        return None, (
            f'"flash_attn_4" needs the package flash-attn-4, which cannot be imported ({_first_line(error)}); '
            "pip install 'deepspeed_ds4sci[flash-attn-4]'"
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

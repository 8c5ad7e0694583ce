# SPDX-License-Identifier: Apache-2.0
"""The op as PyTorch sees it: schema, kernels, fake kernels for torch.compile, first and second derivatives.

    deepspeed_ds4sci::evoformer_attn_fwd(q, k, v, mask_bias, pair_bias, gate, softmax_scale, implementation)
        -> (o, lse)
    deepspeed_ds4sci::evoformer_attn_bwd(do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale,
                                         implementation, wanted)
        -> those wanted of dq, dk, dv, dmask_bias, dpair_bias, dgate, in this order

`implementation` is a name of the dispatch table or "" for the fastest. The choice is made inside the op, so that a
compiled graph does not depend on it. Arguments have been checked by `evoformer_attention`.
"""

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from ._dispatch import choose, problem_of
from ._precision import own_precision
from .reference import lse_dtype, reference_second_gradients

NUM_INPUTS = 6  # q, k, v, mask_bias, pair_bias, gate

_library = torch.library.Library("deepspeed_ds4sci", "FRAGMENT")
_library.define(
    "evoformer_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask_bias, Tensor? pair_bias, "
    "Tensor? gate, float softmax_scale, str implementation) -> (Tensor, Tensor)"
)
_library.define(
    "evoformer_attn_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? mask_bias, Tensor? pair_bias, "
    "Tensor? gate, Tensor o, Tensor lse, float softmax_scale, str implementation, bool[] wanted) -> Tensor[]"
)


def _unit_last_stride(*tensors: Tensor | None) -> list[Tensor | None]:
    """Each of `tensors`, copied only if neighbouring elements of a head are not neighbours in memory."""
    return [x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def _output_shapes(q: Tensor) -> tuple[tuple, tuple]:
    batch, rows, q_len, heads, head_dim = q.shape
    return (batch, rows, q_len, heads, head_dim), (batch, rows, heads, q_len)


def _forward(q, k, v, mask_bias, pair_bias, gate, softmax_scale, implementation):
    if q.numel() == 0 or k.numel() == 0:
        o_shape, lse_shape = _output_shapes(q)
        return q.new_zeros(o_shape), q.new_full(lse_shape, math.inf, dtype=lse_dtype(q))
    chosen = choose(problem_of(q, k, pair_bias, softmax_scale), implementation or None)
    q, k, v, gate = _unit_last_stride(q, k, v, gate)
    return chosen.forward(q, k, v, mask_bias, pair_bias, gate, softmax_scale)


def _forward_fake(q, k, v, mask_bias, pair_bias, gate, softmax_scale, implementation):
    o_shape, lse_shape = _output_shapes(q)
    return q.new_empty(o_shape), q.new_empty(lse_shape, dtype=lse_dtype(q))


def _refuse_gradient_of_boolean(mask_bias: Tensor | None, wanted) -> None:
    if wanted[3] and mask_bias.dtype == torch.bool:
        raise ValueError(
            "mask_bias must be a float tensor to have a gradient, got torch.bool; "
            "pass an additive mask (0 = keep, -inf = drop) to train it"
        )


def _gradients(do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, implementation, wanted):
    """Of the six inputs; None where `wanted`, a tuple, is False."""
    _refuse_gradient_of_boolean(mask_bias, wanted)
    if q.numel() == 0 or k.numel() == 0:
        return tuple(
            torch.zeros_like(x, memory_format=torch.contiguous_format) if w else None
            for x, w in zip((q, k, v, mask_bias, pair_bias, gate), wanted, strict=True)
        )
    chosen = choose(problem_of(q, k, pair_bias, softmax_scale), implementation or None)
    do, q, k, v, gate = _unit_last_stride(do, q, k, v, gate)
    return chosen.backward(do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, wanted)


def _backward(do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, implementation, wanted):
    args = (do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, implementation, tuple(wanted))
    return [grad for grad, w in zip(_gradients(*args), wanted, strict=True) if w]


def _backward_fake(do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, implementation, wanted):
    _refuse_gradient_of_boolean(mask_bias, wanted)
    return [x.new_empty(x.shape) for x, w in zip((q, k, v, mask_bias, pair_bias, gate), wanted, strict=True) if w]


_PLAIN = frozenset((Tensor, Parameter, type(None)))


def is_unobserved(*tensors: Tensor | None) -> bool:
    """Whether nobody could tell a call of the registered op from a direct call of the function behind it.

    The dispatcher visits Python four times in a forward and backward pass, 0.2 ms in all: as much as the kernels of a
    small problem. It is needed by compilers, dispatch and function modes, tensor subclasses and function transforms.
    False also for what is neither a tensor nor None.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    return _PLAIN.issuperset(map(type, tensors))


def _save(ctx, inputs, o, lse, softmax_scale, implementation) -> None:
    ctx.save_for_backward(*inputs, o, lse)
    ctx.softmax_scale, ctx.implementation = softmax_scale, implementation
    ctx.set_materialize_grads(False)


def _first_derivatives(ctx, do) -> tuple:
    """For each argument of `forward`, each gradient only when asked for."""
    if do is None:
        return (None,) * (NUM_INPUTS + 2)
    wanted = ctx.needs_input_grad[:NUM_INPUTS]
    saved = ctx.saved_tensors
    # With gradients enabled somebody wants second derivatives, which the op's autograd key records.
    if not torch.is_grad_enabled() and is_unobserved(do, *saved):
        return (*_gradients(do, *saved, ctx.softmax_scale, ctx.implementation, wanted), None, None)
    grads = iter(_backward_op(do, *saved, ctx.softmax_scale, ctx.implementation, wanted))
    return (*(next(grads) if w else None for w in wanted), None, None)


class _DirectForward(torch.autograd.Function):
    """o of tensors that are unobserved."""

    @staticmethod
    def forward(ctx, q, k, v, mask_bias, pair_bias, gate, softmax_scale, implementation):
        o, lse = _forward(q, k, v, mask_bias, pair_bias, gate, softmax_scale, implementation)
        _save(ctx, (q, k, v, mask_bias, pair_bias, gate), o, lse, softmax_scale, implementation)
        return o

    @staticmethod
    def backward(ctx, do):
        return _first_derivatives(ctx, do)


class _Forward(torch.autograd.Function):
    """o and lse, as the registered op returns them."""

    @staticmethod
    def forward(ctx, q, k, v, mask_bias, pair_bias, gate, softmax_scale, implementation):
        with torch._C._AutoDispatchBelowAutograd():
            o, lse = _forward_op(q, k, v, mask_bias, pair_bias, gate, softmax_scale, implementation)
        _save(ctx, (q, k, v, mask_bias, pair_bias, gate), o, lse, softmax_scale, implementation)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, _dlse):
        return _first_derivatives(ctx, do)


class _Backward(torch.autograd.Function):
    """Second derivatives through the reference formula: memory grows with L^2 here."""

    @staticmethod
    def forward(ctx, do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, implementation, wanted):
        with torch._C._AutoDispatchBelowAutograd():
            grads = _backward_op(
                do, q, k, v, mask_bias, pair_bias, gate, o, lse, softmax_scale, implementation, wanted
            )
        ctx.save_for_backward(do, q, k, v, mask_bias, pair_bias, gate)
        ctx.softmax_scale, ctx.wanted = softmax_scale, wanted
        ctx.set_materialize_grads(False)
        return tuple(grads)

    @staticmethod
    def backward(ctx, *grads):
        given = iter(grads)
        cotangents = tuple(next(given) if w else None for w in ctx.wanted)
        do, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[: NUM_INPUTS + 1]
        with own_precision(do.device.type):
            second = reference_second_gradients(cotangents, do, tuple(inputs), ctx.softmax_scale, needed)
        # o and lse are functions of the other inputs; their share is in the gradients above.
        return (*second, None, None, None, None, None)


def _forward_autograd(*args):
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:NUM_INPUTS]):
        return _Forward.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*args)


def _backward_autograd(*args):
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[: NUM_INPUTS + 1]):
        return list(_Backward.apply(*args))
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(*args)


# The autograd key is registered by hand: torch.library.register_autograd costs 35 us more for each call of either op.
_library.impl("evoformer_attn_fwd", _forward, "CompositeExplicitAutograd")
_library.impl("evoformer_attn_bwd", _backward, "CompositeExplicitAutograd")
_library.impl("evoformer_attn_fwd", _forward_autograd, "Autograd")
_library.impl("evoformer_attn_bwd", _backward_autograd, "Autograd")
torch.library.register_fake("deepspeed_ds4sci::evoformer_attn_fwd", _forward_fake, lib=_library)
torch.library.register_fake("deepspeed_ds4sci::evoformer_attn_bwd", _backward_fake, lib=_library)
_forward_op = torch.ops.deepspeed_ds4sci.evoformer_attn_fwd.default
_backward_op = torch.ops.deepspeed_ds4sci.evoformer_attn_bwd.default


def evoformer_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask_bias: Tensor | None,
    pair_bias: Tensor | None,
    gate: Tensor | None,
    softmax_scale: float,
    implementation: str | None,
    direct: bool,
) -> Tensor:
    """o [B, N, Lq, H, D], gated, of checked arguments; differentiable.

    `direct`: what `is_unobserved` says of the tensors.
    """
    args = (q, k, v, mask_bias, pair_bias, gate, softmax_scale, implementation or "")
    if not direct:
        return _forward_op(*args)[0]
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (mask_bias is not None and mask_bias.requires_grad)
        or (pair_bias is not None and pair_bias.requires_grad)
        or (gate is not None and gate.requires_grad)
    ):
        return _DirectForward.apply(*args)
    return _forward(*args)[0]

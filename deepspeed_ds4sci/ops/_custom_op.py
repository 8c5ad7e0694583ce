# SPDX-License-Identifier: Apache-2.0
"""The op as PyTorch sees it: schema, kernels, fake kernels for torch.compile, first and second derivatives.

    deepspeed_ds4sci::evoformer_attn_fwd(q, k, v, mask_bias, pair_bias, softmax_scale, implementation) -> (o, lse)
    deepspeed_ds4sci::evoformer_attn_bwd(do, q, k, v, mask_bias, pair_bias, o, lse, softmax_scale, implementation,
                                         wanted) -> those wanted of dq, dk, dv, dmask_bias, dpair_bias, in this order

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

NUM_INPUTS = 5  # q, k, v, mask_bias, pair_bias

_library = torch.library.Library("deepspeed_ds4sci", "FRAGMENT")
_library.define(
    "evoformer_attn_fwd(Tensor q, Tensor k, Tensor v, Tensor? mask_bias, Tensor? pair_bias, "
    "float softmax_scale, str implementation) -> (Tensor, Tensor)"
)
_library.define(
    "evoformer_attn_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? mask_bias, Tensor? pair_bias, "
    "Tensor o, Tensor lse, float softmax_scale, str implementation, bool[] wanted) -> Tensor[]"
)


def _unit_last_stride(tensor: Tensor) -> Tensor:
    """`tensor`, copied only if neighbouring elements of a head are not neighbours in memory."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _output_shapes(q: Tensor) -> tuple[tuple, tuple]:
    batch, rows, q_len, heads, head_dim = q.shape
    return (batch, rows, q_len, heads, head_dim), (batch, rows, heads, q_len)


def _forward(q, k, v, mask_bias, pair_bias, softmax_scale, implementation):
    if q.numel() == 0 or k.numel() == 0:
        o_shape, lse_shape = _output_shapes(q)
        return q.new_zeros(o_shape), q.new_full(lse_shape, math.inf, dtype=lse_dtype(q))
    chosen = choose(problem_of(q, k), implementation or None)
    q, k, v = _unit_last_stride(q), _unit_last_stride(k), _unit_last_stride(v)
    return chosen.forward(q, k, v, mask_bias, pair_bias, softmax_scale)


def _forward_fake(q, k, v, mask_bias, pair_bias, softmax_scale, implementation):
    o_shape, lse_shape = _output_shapes(q)
    return q.new_empty(o_shape), q.new_empty(lse_shape, dtype=lse_dtype(q))


def _wanted_inputs(inputs: tuple[Tensor | None, ...], wanted) -> list[Tensor]:
    if wanted[3] and inputs[3].dtype == torch.bool:
        raise ValueError(
            "mask_bias must be a float tensor to have a gradient, got torch.bool; "
            "pass an additive mask (0 = keep, -inf = drop) to train it"
        )
    return [x for x, w in zip(inputs, wanted, strict=True) if w]


def _backward(do, q, k, v, mask_bias, pair_bias, o, lse, softmax_scale, implementation, wanted):
    sources = _wanted_inputs((q, k, v, mask_bias, pair_bias), wanted)
    if q.numel() == 0 or k.numel() == 0:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in sources]
    chosen = choose(problem_of(q, k), implementation or None)
    do, q, k, v = (_unit_last_stride(x) for x in (do, q, k, v))
    grads = chosen.backward(do, q, k, v, mask_bias, pair_bias, o, lse, softmax_scale, tuple(wanted))
    return [grad for grad, w in zip(grads, wanted, strict=True) if w]


def _backward_fake(do, q, k, v, mask_bias, pair_bias, o, lse, softmax_scale, implementation, wanted):
    return [x.new_empty(x.shape) for x in _wanted_inputs((q, k, v, mask_bias, pair_bias), wanted)]


def _is_unobserved(*tensors: Tensor | None) -> bool:
    """Whether nobody could tell a call of the registered op from a direct call of the function behind it.

    The dispatcher visits Python four times in a forward and backward pass, 0.2 ms in all: as much as the kernels of a
    small problem. It is needed by compilers, dispatch and function modes, tensor subclasses and function transforms.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    return all(x is None or type(x) is Tensor or type(x) is Parameter for x in tensors)


class _Forward(torch.autograd.Function):
    """First derivatives: each gradient only when asked for."""

    @staticmethod
    def forward(ctx, q, k, v, mask_bias, pair_bias, softmax_scale, implementation):
        if _is_unobserved(q, k, v, mask_bias, pair_bias):
            o, lse = _forward(q, k, v, mask_bias, pair_bias, softmax_scale, implementation)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                o, lse = _forward_op(q, k, v, mask_bias, pair_bias, softmax_scale, implementation)
        ctx.save_for_backward(q, k, v, mask_bias, pair_bias, o, lse)
        ctx.softmax_scale, ctx.implementation = softmax_scale, implementation
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    def backward(ctx, do, _dlse):
        if do is None:
            return (None,) * (NUM_INPUTS + 2)
        wanted = ctx.needs_input_grad[:NUM_INPUTS]
        saved = ctx.saved_tensors
        # With gradients enabled somebody wants second derivatives, which the op's autograd key records.
        direct = not torch.is_grad_enabled() and _is_unobserved(do, *saved)
        function = _backward if direct else _backward_op
        grads = iter(function(do, *saved, ctx.softmax_scale, ctx.implementation, wanted))
        return (*(next(grads) if w else None for w in wanted), None, None)


class _Backward(torch.autograd.Function):
    """Second derivatives through the reference formula: memory grows with L^2 here."""

    @staticmethod
    def forward(ctx, do, q, k, v, mask_bias, pair_bias, o, lse, softmax_scale, implementation, wanted):
        with torch._C._AutoDispatchBelowAutograd():
            grads = _backward_op(do, q, k, v, mask_bias, pair_bias, o, lse, softmax_scale, implementation, wanted)
        ctx.save_for_backward(do, q, k, v, mask_bias, pair_bias)
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
    softmax_scale: float,
    implementation: str | None,
) -> Tensor:
    """o [B, N, Lq, H, D] of checked arguments; differentiable."""
    inputs = (q, k, v, mask_bias, pair_bias)
    function = _forward_op
    if _is_unobserved(*inputs):
        wants_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
        function = _Forward.apply if wants_grad else _forward
    return function(*inputs, softmax_scale, implementation or "")[0]

# SPDX-License-Identifier: Apache-2.0
"""Attention outputs that recomputation takes over in place of computing them again.

Everything but attention grows linearly with the sequence, so keeping what attention returned (its output and
log-sum-exp, as large as what the layer starts from) removes most of what recomputation costs at length. Queries, keys
and values are computed again: attention's backward pass needs them.

torch's selective checkpointing contexts ask every operation of the forward pass to come again in the same order, which
the gathers of ZeRO-3 do not; here only attention is looked at.
"""

from collections import deque
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# By name: a build of torch may lack some.
_FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)

_active: ContextVar["_Pass | None"] = ContextVar("kept attention outputs", default=None)


def keeping_contexts(leave: Callable | None = None) -> tuple["_Pass", "_Pass"]:
    """The two contexts that `torch.utils.checkpoint.checkpoint(context_fn=...)` asks for.

    In the first, the results of attention are kept; in the second they are taken, in the same order. `first.count` is
    how many were kept.

    Args:
        leave: takes a contiguous tensor away, such as to CPU memory, and returns what has it `back()`. It gets the
            largest tensor of each result, attention's output; the others are small. None: all stay.
    """
    results = deque()
    return _Pass(results, leave, replaying=False), _Pass(results, leave, replaying=True)


def kept(name: str, compute: Callable):
    """compute(), a nested structure of tensors without graph; its kept result while recomputing.

    For attention that is more than one operation of torch, such as a ring's.

    Args:
        name: says what it is, to notice a recomputation that goes another way.
    """
    current = _active.get()
    return compute() if current is None else current.result(name, compute)


class _Pass(TorchDispatchMode):
    """A forward pass whose attention results are kept, or the recomputation that takes them."""

    def __init__(self, results, leave, replaying):
        super().__init__()
        self.count = 0
        self._results, self._leave, self._replaying, self._token = results, leave, replaying, None

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __enter__(self):
        self._token = _active.set(self)
        return super().__enter__()

    def __exit__(self, *error):
        _active.reset(self._token)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _active.get() is self and function in _operations():
            return self.result(str(function), lambda: function(*args, **kwargs))
        return function(*args, **kwargs)

    def result(self, name, compute):
        if self._replaying:
            if not self._results or self._results[0][0] != name:
                raise RuntimeError(
                    f"recomputation came to {name} where the forward pass did not: the layer depends on something "
                    "that changed in between, or its backward pass runs a second time"
                )
            return tree_map_only(_Left, _Left.back, self._results.popleft()[1])
        token = _active.set(None)  # operations inside are parts of one result
        try:
            found = compute()
        finally:
            _active.reset(token)
        # The tensors themselves get a graph on their way out.
        results = tree_map_only(torch.Tensor, torch.Tensor.detach, found)
        if self._leave is not None:
            largest = max((x.nbytes for x in tree_leaves(results) if isinstance(x, torch.Tensor)), default=0)
            results = tree_map_only(
                torch.Tensor, lambda x: _Left(x, self._leave) if x.nbytes == largest else x, results
            )
        self._results.append((name, results))
        self.count += 1
        return found


class _Left:
    """A tensor that was taken away and comes back with the strides it had, which kernels choose."""

    def __init__(self, tensor, leave):
        self._order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        self._away = leave(tensor.permute(self._order))

    def back(self) -> torch.Tensor:
        tensor = self._away.back()
        return tensor.permute([self._order.index(dim) for dim in range(tensor.dim())])


def _operations():
    names = (getattr(torch.ops.aten, name, None) for name in _FUSED_ATTENTION)
    found = {packet.default for packet in names if packet is not None}
    return {*found, torch.ops.flash_attn._flash_attn_forward.default} if keeps_flash_attn() else found


def keeps_flash_attn() -> bool:
    """Whether the package flash_attn, which is imported by now, registers an operation; its early versions do not."""
    return hasattr(torch.ops.flash_attn, "_flash_attn_forward")

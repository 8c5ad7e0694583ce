# SPDX-License-Identifier: Apache-2.0
"""How much memory tensors hold at once, counted without an allocator's statistics, so on a CPU too."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """`peak`: the most bytes at once in the storages of tensors that operations inside made."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._live = set()  # addresses of storages

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(output):
            address = storage._cdata
            if address not in given and address not in self._live:
                self._live.add(address)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._freed, address, storage.nbytes())
        return output

    def _freed(self, address, nbytes):
        self._live.remove(address)
        self._now -= nbytes


def _storages(values):
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]

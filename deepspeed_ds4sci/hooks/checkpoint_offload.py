# SPDX-License-Identifier: Apache-2.0
"""What checkpointed layers start from and what attention returned in them, kept in CPU memory for the backward pass.

On a GPU the copies run on a stream of their own: out while the layer computes, and back one layer ahead of the
backward pass. At most two such tensors of each kind are on the device at a time, next to the layer at work.
"""

import weakref

import torch
from torch.autograd.graph import saved_tensors_hooks

from deepspeed_ds4sci.hooks.host_memory import HostPool


class CheckpointOffload:
    """Moves one tensor of each checkpointed call; all of an engine that are made and asked for in turn.

    Use: `with offload.of(hidden): checkpoint(function, hidden, ...)`, or `leave` a tensor and have it `back()` later.
    """

    def __init__(self):
        self.pool: HostPool | None = None  # made at the first use, which knows the device
        self._stream = None
        self._latest = lambda: None  # weak reference to the tensor that left last

    def __deepcopy__(self, memo):
        """That of a copy of the model, which keeps its own."""
        return CheckpointOffload()

    def of(self, tensor: torch.Tensor) -> saved_tensors_hooks:
        """A context in which `tensor`, where autograd saves it, is kept in CPU memory; other tensors stay."""

        # Autograd keeps `pack` as long as what it packed, so it must not hold the tensor.
        address, shape = tensor.data_ptr(), tensor.shape
        del tensor

        def pack(saved):
            if saved.data_ptr() != address or saved.shape != shape:
                return saved.detach()
            return self.leave(saved.detach())

        return saved_tensors_hooks(pack, _unpack)

    def leave(self, tensor: torch.Tensor) -> "_Away":
        """Starts to copy a tensor to CPU memory. It stays on the device until the next one leaves."""
        if self.pool is None:
            self._start(tensor.device)
        before = self._latest()
        if before is not None:
            before.settle()
        away = _Away(tensor, self.pool, self._stream, self._latest)
        self._latest = weakref.ref(away)
        return away

    def _start(self, device):
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError(
                "ds4sci.activation_checkpointing.cpu_offload and cpu_offload_attention work on CUDA and CPU devices, "
                f"got {device}"
            )
        self.pool = HostPool(pinned=device.type == "cuda")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None


def _unpack(packed):
    return packed.back() if isinstance(packed, _Away) else packed


class _Away:
    """One tensor in CPU memory. `on_device` is set while it is also on the device: leaving, or fetched ahead.

    `owner` is the stream that it was made on. Its memory on the device is taken from and given back to this stream,
    whichever thread lets go of it.
    """

    def __init__(self, tensor, pool, stream, before):
        self.pool, self.stream, self.before = pool, stream, before
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.on_device = self.copied = self.slot = None
        self.owner = None if stream is None else torch.cuda.current_stream(self.device)
        self.slot = pool.take(tensor.nbytes)
        if stream is None:
            self._host().copy_(tensor)
        else:
            self.on_device = tensor.contiguous()
            self._copy(self._host(), self.on_device)

    def back(self) -> torch.Tensor:
        """The tensor on its device; the one that left before it starts to come back."""
        if self.stream is None:
            return self._host().clone()
        self.fetch()
        tensor, reader = self.on_device, torch.cuda.current_stream(self.device)
        reader.wait_event(self.copied)
        tensor.record_stream(reader)
        self.settle()
        before = self.before()
        if before is not None:
            before.fetch()
        return tensor

    def fetch(self):
        """Starts the copy to the device, unless it is there."""
        if self.on_device is None and self.stream is not None:
            with torch.cuda.stream(self.owner):
                self.on_device = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self._copy(self.on_device, self._host())

    def settle(self):
        """Lets go of the tensor on the device once no copy from or to it is under way."""
        if self.on_device is not None:
            self.owner.wait_event(self.copied)
            self.on_device = None

    def _host(self):
        return self.slot.view(self.shape, self.dtype)

    def _copy(self, target, source):
        # The source may still be written, or the target's memory read by its former owner.
        self.stream.wait_stream(self.owner)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            self.copied = self.stream.record_event()

    def __del__(self):
        self.settle()
        if self.slot is not None:  # else there was no memory
            self.pool.give_back(self.slot)

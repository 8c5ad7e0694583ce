# SPDX-License-Identifier: Apache-2.0
"""CPU memory for activations that wait there: as large as asked for, page-locked where a GPU reads it.

torch's allocator of pinned memory rounds every request up to a power of two, which nearly doubles what long sequences
need. Here each slot is mapped on its own, in whole pages, and registered with CUDA.
"""

import math
import mmap
import weakref

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device of the process


class HostSlot:
    """`capacity` bytes of CPU memory."""

    def __init__(self, capacity: int, pinned: bool):
        self.capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        self.pinned = pinned
        pages = mmap.mmap(-1, self.capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)  # fewer faults, and pages to lock, for gigabytes
        # A child process, such as a data loader's, would make writes here go to copies that the GPU does not see.
        pages.madvise(mmap.MADV_DONTFORK)
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8)
        if pinned:
            _check(
                torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), self.capacity, _PORTABLE), self.capacity
            )
            # A slot may also vanish with its pool. Pages unmapped while registered would leave CUDA with a range that
            # the next mapping at this address falls into, and copies from there fail. The tensor given here keeps
            # the pages mapped until they are unregistered; at exit the driver does so itself.
            self._unlock = weakref.finalize(self, _unregister, self.bytes)
            self._unlock.atexit = False

    def view(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The first bytes as a contiguous tensor."""
        return self.bytes[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def release(self) -> None:
        """Gives the memory back to the system, after the copies from and to it that are under way."""
        if self.pinned:
            self._unlock()
        self.bytes = None


class HostPool:
    """Slots that are used again and again. There are never more than were in use at once.

    Args:
        pinned: page-lock the memory for CUDA.
    """

    def __init__(self, pinned: bool):
        self.pinned = pinned
        self.held_bytes = 0
        """Bytes of all slots, in use or free."""
        self._free: list[HostSlot] = []  # given back from any thread; appending and removing are atomic

    def take(self, nbytes: int) -> HostSlot:
        """The smallest free slot that is large enough. If none is, the largest free one makes room for a new one."""
        free = sorted(self._free, key=lambda slot: slot.capacity)
        fitting = next((slot for slot in free if slot.capacity >= nbytes), None)
        if fitting is not None:
            self._free.remove(fitting)
            return fitting
        if free:
            self._free.remove(free[-1])
            self.held_bytes -= free[-1].capacity
            free[-1].release()
        slot = HostSlot(nbytes, self.pinned)
        self.held_bytes += slot.capacity
        return slot

    def give_back(self, slot: HostSlot) -> None:
        self._free.append(slot)


def _unregister(pages):
    torch.cuda.synchronize()  # a copy from or to them may be under way
    _check(torch.cuda.cudart().cudaHostUnregister(pages.data_ptr()), pages.numel())


def _check(result, nbytes):
    if int(result) != 0:
        raise RuntimeError(
            f"CUDA cannot page-lock or unlock {nbytes / 2**30:.2f} GiB of CPU memory (error {int(result)}); what "
            "limits locking is the machine's free memory and that of the process (ulimit -l)"
        )

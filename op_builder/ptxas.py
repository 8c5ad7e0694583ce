# SPDX-License-Identifier: Apache-2.0
"""Reads what `nvcc -Xptxas -v` prints: registers, shared memory, spills, and lost tensor-core overlap."""

import re
import shutil
import subprocess
from dataclasses import dataclass, field

_ENTRY = re.compile(r"Compiling entry function '([^']+)' for '(sm_\w+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_LOCAL = re.compile(r"(\d+) bytes lmem")
# C7510 and C7514 say that wgmma instructions run one after the other; their siblings are losses of the same kind, but
# for C7519, which reports one fence more.
_LOSS = re.compile(r"(?:\((C75(?!19)\d\d)\).*|Potential Performance Loss.*)")


@dataclass
class Kernel:
    """One kernel, compiled for one architecture."""

    symbol: str
    """Mangled name."""

    arch: str
    registers: int = 0
    shared_bytes: int = 0
    """Static shared memory only; what a launch asks for is not known to the compiler."""

    local_bytes: int = 0
    """Stack frame or other local memory: arrays that did not fit into registers."""

    spill_bytes: int = 0
    losses: list[str] = field(default_factory=list)
    """Lines about serialised tensor-core instructions."""

    def problems(self):
        """What makes this kernel unacceptable, as texts; [] if nothing does."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes of registers")
        if self.local_bytes:
            found.append(f"uses {self.local_bytes} bytes of local memory")
        return found + self.losses


def parse_ptxas(text):
    """Reads the compiler's output.

    Returns:
        list of Kernel in order of appearance. A line about serialised instructions belongs to the kernel whose symbol
        it names (the sm_90a one, if there are several: wgmma exists nowhere else), else to the one compiled last; with
        no kernel at all it makes one named "(unknown)".

    Source: the messages of ptxas 13.0.
    """
    kernels = []
    early_losses = []
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            kernels.append(Kernel(symbol=match[1], arch=match[2]))
        elif match := _LOSS.search(line):
            early_losses.append(match[0])
        elif kernels:
            _read_usage(line, kernels[-1])
    for loss in early_losses:
        _owner(kernels, loss).losses.append(loss)
    return kernels


def _read_usage(line, kernel):
    if match := _MEMORY.search(line):
        # Device functions that were not inlined report their own frames under the kernel that calls them.
        kernel.local_bytes = max(kernel.local_bytes, int(match[1]))
        kernel.spill_bytes = max(kernel.spill_bytes, int(match[2]) + int(match[3]))
    elif match := _REGISTERS.search(line):
        kernel.registers = int(match[1])
        if match := _SHARED.search(line):
            kernel.shared_bytes = int(match[1])
        if match := _LOCAL.search(line):
            kernel.local_bytes = max(kernel.local_bytes, int(match[1]))


def _owner(kernels, loss):
    named = [kernel for kernel in kernels if f"'{kernel.symbol}'" in loss]
    if named:
        return max(named, key=lambda kernel: kernel.arch == "sm_90a")
    if not kernels:
        kernels.append(Kernel(symbol="(unknown)", arch="(unknown)"))
    return kernels[-1]


def demangle(symbols):
    """Readable names for mangled ones, {symbol: name}; the symbols themselves where c++filt is not installed."""
    symbols = list(symbols)
    if not symbols or shutil.which("c++filt") is None:
        return {symbol: symbol for symbol in symbols}
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return dict(zip(symbols, done.stdout.splitlines(), strict=True))

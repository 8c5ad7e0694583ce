# SPDX-License-Identifier: Apache-2.0
"""The GPU architectures to compile for: parsing, checking, and what each of them runs on."""

import logging
import os
import re
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# What `make build` compiles: every architecture that the project supports.
ALL_TARGETS = "8.0;8.6;8.9;9.0a;10.0;12.0"

_ENTRY = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")


@dataclass(frozen=True, order=True)
class Target:
    """One architecture: machine code for it, and with `ptx` also intermediate code for later ones."""

    major: int
    minor: int
    suffix: str = ""
    """"a": instructions of this architecture alone; "f": of its family; "": portable."""

    ptx: bool = False

    def __str__(self):
        return f"{self.major}.{self.minor}{self.suffix}{'+PTX' if self.ptx else ''}"

    @property
    def arch(self):
        """The nvcc name without its prefix, as in sm_90a and compute_90a."""
        return f"{self.major}{self.minor}{self.suffix}"

    def gencode_flags(self):
        """nvcc flags that generate code for this target."""
        flags = [f"-gencode=arch=compute_{self.arch},code=sm_{self.arch}"]
        if self.ptx:
            # Intermediate code of an "a" architecture runs nowhere else, so PTX is always the portable one.
            portable = f"{self.major}{self.minor}"
            flags.append(f"-gencode=arch=compute_{portable},code=compute_{portable}")
        return flags

    def runs_on(self, capability):
        """Whether a GPU of this compute capability (major, minor) can run the generated code."""
        own = (self.major, self.minor)
        if self.ptx and capability >= own:
            return True
        if self.suffix == "a":
            return capability == own
        return capability[0] == self.major and capability >= own


def target_for(capability):
    """The target for a visible GPU. Hopper's is 9.0a: its tensor-core instructions exist there only."""
    major, minor = capability
    return Target(major, minor, "a" if capability == (9, 0) else "")


def parse_targets(text, min_capability=(8, 0)):
    """Reads a list such as "8.0;9.0a+PTX 10.0", in the format of TORCH_CUDA_ARCH_LIST.

    Entries older than `min_capability` are left out with a log line, since such lists are often set for a whole
    machine; 9.0 becomes 9.0a, which runs on the same GPUs. Doubles are merged.

    Returns:
        Sorted list of Target, at least one.

    Raises:
        ValueError: an entry is not an architecture, or none is left.
    """
    merged = {}
    too_old = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        if not entry:
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST must list architectures such as 8.0 or 9.0a+PTX, got {entry!r} in {text!r}"
            )
        capability = (int(match[1]), int(match[2]))
        if capability < min_capability:
            too_old.append(entry)
            continue
        suffix = match[3] or target_for(capability).suffix
        key = (*capability, suffix)
        merged[key] = merged.get(key, False) or match[4] is not None
    oldest = "{}.{}".format(*min_capability)
    if not merged:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST must name an architecture from {oldest} on, got {text!r}")
    if too_old:
        logger.info("TORCH_CUDA_ARCH_LIST: leaving out %s, older than %s", ", ".join(too_old), oldest)
    return sorted(Target(*key, ptx=ptx) for key, ptx in merged.items())


def requested_targets(capabilities=(), min_capability=(8, 0)):
    """What to compile for: TORCH_CUDA_ARCH_LIST if it is set, else the GPUs of the given capabilities.

    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST cannot be read, or neither it nor a GPU names a target.
    """
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if text.strip():
        return parse_targets(text, min_capability)
    targets = sorted({target_for(capability) for capability in capabilities if capability >= min_capability})
    if not targets:
        raise ValueError(
            "no architecture to compile for: TORCH_CUDA_ARCH_LIST is not set (for example to 9.0a) and no GPU fits"
        )
    return targets

# SPDX-License-Identifier: Apache-2.0
"""Finds the sequence length above which masks are better built in CPU memory on this GPU, and writes it to a config.

    python -m deepspeed_ds4sci.sequence.mask_threshold ds_config.json --reserve-gib 60

Each length's mask is built both ways and the threshold is the longest length up to which the device is never slower
and never runs out of memory. Reserve as much as training uses beside the mask: that is the memory masks compete with.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deepspeed_ds4sci.sequence.masks import MaskFactory

LENGTHS = (1024, 2048, 4096, 8192, 16384, 24576, 32768, 49152, 65536)


@dataclass(frozen=True)
class Measurement:
    """One length, both ways. Seconds are None where the device ran out of memory."""

    seq_len: int
    device_seconds: float | None
    device_peak_bytes: int
    cpu_seconds: float | None
    cpu_peak_bytes: int  # on the device, while building in CPU memory


def choose_threshold(measurements: Sequence[Measurement]) -> int:
    """The longest length, in tokens, up to which building on the device always worked and was no slower.

    Raises:
        ValueError: not even the shortest length is better built on the device.
    """
    best = None
    for m in sorted(measurements, key=lambda m: m.seq_len):
        if m.device_seconds is None or (m.cpu_seconds is not None and m.device_seconds > m.cpu_seconds):
            break
        best = m.seq_len
    if best is None:
        raise ValueError(
            "no measured length is built faster on the device; measure shorter ones or reserve less memory"
        )
    return best


def measure(device: torch.device, lengths: Sequence[int] = LENGTHS, reserve_bytes: int = 0) -> list[Measurement]:
    """Builds causal masks of each length on a GPU and in CPU memory; stops after the first that fits in neither.

    Raises:
        NotImplementedError: the device is not a CUDA GPU, or torch sees none.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise NotImplementedError(f"the threshold is a property of a CUDA GPU, got device {device}")
    if not torch.cuda.is_available():
        raise NotImplementedError("the threshold is a property of a CUDA GPU, and torch sees none here")
    ballast = torch.empty(reserve_bytes, dtype=torch.uint8, device=device)
    measurements = []
    for seq_len in lengths:
        on_device = _timed(MaskFactory(device, cpu_threshold=seq_len), seq_len)
        on_cpu = _timed(MaskFactory(device, cpu_threshold=max(seq_len - 1, 1)), seq_len)
        measurements.append(Measurement(seq_len, *on_device, *on_cpu))
        if on_device[0] is None and on_cpu[0] is None:
            break
    del ballast
    return measurements


def _timed(factory, seq_len):
    """(best of three seconds or None, peak bytes on the device beyond what was there)."""
    before, best = torch.cuda.memory_allocated(factory.device), None
    torch.cuda.reset_peak_memory_stats(factory.device)
    try:
        for _ in range(3):
            torch.cuda.synchronize(factory.device)
            start = time.perf_counter()
            factory(seq_len, causal=True)
            torch.cuda.synchronize(factory.device)
            seconds = time.perf_counter() - start
            best = seconds if best is None else min(best, seconds)
    except torch.OutOfMemoryError:
        best = None
    peak = torch.cuda.max_memory_allocated(factory.device) - before
    torch.cuda.empty_cache()
    return best, peak


def write_threshold(path: str | os.PathLike, threshold: int) -> None:
    """Sets `ds4sci.attention_mask.cpu_threshold` in a DeepSpeed config file; the rest of it stays.

    The file is replaced in one step, so a crash leaves the old one.

    Raises:
        ValueError: the file is missing, is no JSON object, or holds another kind of value in the way.
    """
    path = Path(path)
    config = _read(path)
    block = config
    for key in ("ds4sci", "attention_mask"):
        block = block.setdefault(key, {})
        if not isinstance(block, dict):
            raise ValueError(f"{key} in {path} must be a JSON object, got {block!r}")
    block["cpu_threshold"] = threshold
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        json.dump(config, file, indent=4)
        file.write("\n")
    os.chmod(file.name, path.stat().st_mode)
    os.replace(file.name, path)


def _read(path):
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def table(measurements: Sequence[Measurement]) -> str:
    """The measurements as text."""

    def cells(seconds, peak):
        return f"{'OOM':>10}" if seconds is None else f"{seconds * 1e3:10.2f}", f"{peak / 2**20:10.1f}"

    lines = ["   tokens  on GPU ms  peak MiB  on CPU ms  peak MiB"]
    for m in measurements:
        device, cpu = cells(m.device_seconds, m.device_peak_bytes), cells(m.cpu_seconds, m.cpu_peak_bytes)
        lines.append(f"{m.seq_len:9d} {device[0]}{device[1]} {cpu[0]}{cpu[1]}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, measure: Callable = measure) -> int:
    """The command. Returns the exit code: 0, or 2 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m deepspeed_ds4sci.sequence.mask_threshold", description=__doc__)
    parser.add_argument("config", help="DeepSpeed config file to write the threshold to")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--reserve-gib", type=float, default=0.0, help="GPU memory that training uses beside the mask")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    options = parser.parse_args(arguments)
    try:
        _read(Path(options.config))  # a bad file is told before minutes of measuring
        measurements = measure(torch.device(options.device), options.lengths, int(options.reserve_gib * 2**30))
        print(table(measurements))
        threshold = choose_threshold(measurements)
        write_threshold(options.config, threshold)
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"ds4sci.attention_mask.cpu_threshold = {threshold} tokens, written to {options.config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

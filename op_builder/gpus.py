# SPDX-License-Identifier: Apache-2.0
"""Which GPUs this process may see, asked of the driver's management library (NVML).

CUDA itself is not asked: initialising it makes later `fork()`s unusable, which is too high a price for a
compatibility check at import time.
"""

import ctypes
import os
import sys
from dataclasses import dataclass

_NVML_SUCCESS = 0
_NAME_BYTES = 96


@dataclass(frozen=True)
class Gpu:
    """One physical GPU."""

    name: str
    uuid: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver says of the machine."""

    cuda_version: tuple[int, int]
    """Newest CUDA version that the driver runs."""

    gpus: tuple[Gpu, ...]
    """All GPUs of the machine in PCI order, whatever CUDA_VISIBLE_DEVICES says."""


def query_driver():
    """Asks NVML. Returns a Driver, or None where there is no NVIDIA driver or it does not answer."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != _NVML_SUCCESS:
        return None
    try:
        version = ctypes.c_int()
        if nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version)) != _NVML_SUCCESS:
            return None
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _NVML_SUCCESS:
            return None
        gpus = (_query_gpu(nvml, index) for index in range(count.value))
        return Driver(
            cuda_version=(version.value // 1000, version.value % 1000 // 10),
            gpus=tuple(gpu for gpu in gpus if gpu is not None),
        )
    finally:
        nvml.nvmlShutdown()


def _query_gpu(nvml, index):
    """The GPU with this NVML index, or None if this process may not use it."""
    handle = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != _NVML_SUCCESS:
        return None
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) != _NVML_SUCCESS:
        return None
    texts = []
    for query in (nvml.nvmlDeviceGetName, nvml.nvmlDeviceGetUUID):
        buffer = ctypes.create_string_buffer(_NAME_BYTES)
        status = query(handle, buffer, ctypes.c_uint(_NAME_BYTES))
        texts.append(buffer.value.decode(errors="replace") if status == _NVML_SUCCESS else "")
    return Gpu(name=texts[0] or f"GPU {index}", uuid=texts[1], capability=(major.value, minor.value))


def select_visible(gpus, cuda_visible_devices, pci_order):
    """The GPUs that CUDA_VISIBLE_DEVICES leaves visible.

    CUDA numbers GPUs fastest first unless CUDA_DEVICE_ORDER=PCI_BUS_ID, and NVML by PCI order. On a machine with
    different GPUs a number is therefore ambiguous, and so is the id of a MIG slice; all GPUs are returned then:
    compiling for one GPU too many is harmless, for one too few is not.

    Args:
        gpus: all GPUs in PCI order.
        cuda_visible_devices: value of the environment variable, None if unset.
        pci_order: True if CUDA uses PCI order too.
    """
    if cuda_visible_devices is None:
        return list(gpus)
    numbers_known = pci_order or len({gpu.capability for gpu in gpus}) <= 1
    selected = []
    for token in (part.strip() for part in cuda_visible_devices.split(",")):
        if token.isdigit():
            if int(token) >= len(gpus):
                break  # like CUDA: the first invalid entry ends the list
            if not numbers_known:
                return list(gpus)
            matches = [gpus[int(token)]]
        elif token.startswith("GPU-"):
            matches = [gpu for gpu in gpus if gpu.uuid.startswith(token)]
        elif token.startswith("MIG-"):
            return list(gpus)
        else:
            break
        selected += [gpu for gpu in matches if gpu not in selected]
    return selected


def visible_gpus():
    """The GPUs this process may see, [] if none. Never initialises CUDA and never raises.

    A process that has initialised CUDA already is answered by torch, which then knows best.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork():
        return [
            Gpu(torch.cuda.get_device_name(i), "", torch.cuda.get_device_capability(i))
            for i in range(torch.cuda.device_count())
        ]
    driver = query_driver()
    if driver is None:
        return []
    pci_order = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    return select_visible(driver.gpus, os.environ.get("CUDA_VISIBLE_DEVICES"), pci_order)

# SPDX-License-Identifier: Apache-2.0
"""`python -m deepspeed_ds4sci.report`: versions, the state of the compiled library, and which implementation of
the op would run here, with the reasons against the faster ones.

Where a GPU is visible and the library has yet to be compiled, that happens now: only then is it known to load.
"""

import importlib.metadata
import os
import platform
import sys

import torch

from deepspeed_ds4sci import _autoload, plugin
from deepspeed_ds4sci._version import __version__

_LABEL_WIDTH = 22
# A shape of the Evoformer's triangle attention; the choice hardly depends on it.
_SHAPE = {"batch": 1, "rows": 256, "q_len": 256, "k_len": 256, "heads": 4, "head_dim": 32, "softmax_scale": 32**-0.5}
_DTYPES = {
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
    "cpu": (torch.bfloat16, torch.float32, torch.float64),
}


def _line(label, value):
    return f"{label} ".ljust(_LABEL_WIDTH, ".") + f" {value}"


def version_lines():
    """Versions of what takes part, and whether DeepSpeed is one that the hooks support."""
    try:
        deepspeed = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        deepspeed = "not installed"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return [
        _line("deepspeed_ds4sci", __version__),
        _line("Python", platform.python_version()),
        _line("torch", f"{torch.__version__} ({cuda})"),
        _line("deepspeed", f"{deepspeed} (supported: {plugin.SUPPORTED_DEEPSPEED})"),
    ]


def hook_line():
    """Whether DeepSpeed's names lead to this package."""
    if _autoload.disabled_by_environment():
        return _line("hooks into DeepSpeed", "off: DS4SCI_DISABLE is set")
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return _line("hooks into DeepSpeed", "on after `import deepspeed_ds4sci` (TORCH_DEVICE_BACKEND_AUTOLOAD=0)")
    return _line("hooks into DeepSpeed", "on" if plugin.enabled() else "off: see the warning in the log")


def build_lines(builder, gpus, nvcc, driver):
    """The GPUs, the compiler and the library.

    Args:
        builder: EvoformerAttnBuilder, or anything with its build_state() and missing().
        gpus: list of Gpu; nvcc: Nvcc or None; driver: Driver or None.
    """
    lines = [_line(f"GPU {i}", "{}, capability {}.{}".format(gpu.name, *gpu.capability)) for i, gpu in enumerate(gpus)]
    if not gpus:
        lines.append(_line("GPU", "none visible"))
    if driver is not None:
        lines.append(_line("NVIDIA driver", "runs CUDA up to {}.{}".format(*driver.cuda_version)))
    lines.append(_line("nvcc", "not found" if nvcc is None else "{} (CUDA {}.{})".format(nvcc.path, *nvcc.version)))
    state = builder.build_state()
    where = f": {state.path}" if state.kind in ("prebuilt", "cached") else ""
    lines.append(_line("compiled library", f"{state.kind}{where}"))
    lines += [f"  - {reason}" for reason in builder.missing()]
    return lines


def implementation_lines(problems, explain):
    """Which implementation would run each problem, with a line for every faster one that would not.

    Args:
        problems: list of (text, Problem).
        explain: function from a Problem to [(name, None or why not), ...], fastest first.
    """
    lines = []
    for text, problem in problems:
        verdicts = [(name, reason) for name, reason in explain(problem) if name != "reference"]
        chosen = next((name for name, reason in verdicts if reason is None), None)
        lines.append(_line(text, chosen or "none"))
        for name, reason in verdicts:
            if name == chosen:
                break
            lines.append(f"  - not {name}: {reason}")
    return lines


def problems_here(gpus):
    """(text, Problem) for each dtype on each kind of visible GPU, or on the CPU where there is none."""
    from deepspeed_ds4sci.ops._dispatch import Problem

    devices = [("cuda", capability) for capability in sorted({gpu.capability for gpu in gpus})] or [("cpu", None)]
    problems = []
    for kind, capability in devices:
        device = kind if capability is None else "{} {}.{}".format(kind, *capability)
        for dtype in _DTYPES[kind]:
            problem = Problem(device_type=kind, capability=capability, dtype=dtype, pair_dtype=dtype, **_SHAPE)
            problems.append((f"{device} {str(dtype).removeprefix('torch.')}", problem))
    return problems


def main():
    """Prints the report. Returns the exit code, 0."""
    from deepspeed_ds4sci.op_builder.evoformer_attn import EvoformerAttnBuilder
    from deepspeed_ds4sci.op_builder.gpus import query_driver, visible_gpus
    from deepspeed_ds4sci.op_builder.nvcc import find_nvcc
    from deepspeed_ds4sci.ops._dispatch import explain

    gpus = visible_gpus()
    print("\n".join(version_lines()))
    print(hook_line())
    print("\n".join(build_lines(EvoformerAttnBuilder(), gpus, find_nvcc(), query_driver())))
    print("\nevoformer_attention would run")
    print("\n".join(implementation_lines(problems_here(gpus), explain)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

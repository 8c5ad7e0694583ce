# SPDX-License-Identifier: Apache-2.0
"""Write instantiations/*.cu: one kernel family and dtype per file, so that they compile in parallel.

Head dims share a file: most of the compiler's time for one of them goes into headers (5.3 s for five, 2.4 s for one).
Run it after a change here; a test asserts that the folder equals what this script writes.
"""

from pathlib import Path

HEAD_DIMS = (16, 32, 48, 64, 128)
DTYPES = {"fp16": "fp16", "bf16": "bf16", "fp32": "float"}
KERNELS = ("fwd", "bwd_dq", "bwd_dkv", "bwd_dpair")
SM90_KERNELS, SM90_HEAD_DIMS = (*KERNELS, "bwd_dqkv"), (16, 32, 64)
SM90_DTYPES = {"fp16": "fp16", "bf16": "bf16"}


def instantiations() -> dict[str, str]:
    """File name -> content."""
    files = {"prepare.cu": _file("prepare_launch.cuh", ("run_prepare", "run_finish_dpair"), DTYPES.values())}
    for name, element in DTYPES.items():
        for kernel in KERNELS:
            arguments = [f"{element}, {head_dim}" for head_dim in HEAD_DIMS]
            files[f"{kernel}_{name}.cu"] = _file("sm80/launch.cuh", (f"run_evoformer_{kernel}",), arguments)
    files["prepare_sm90.cu"] = _file("sm90/launch.cuh", ("run_sm90_prepare",), SM90_DTYPES.values(), "Sm90Params")
    for name, element in SM90_DTYPES.items():
        arguments = [f"{element}, {head_dim}" for head_dim in SM90_HEAD_DIMS]
        for kernel in SM90_KERNELS:
            functions = [f"run_sm90_{kernel}"] + (["run_sm90_bwd_marked_dpair"] if kernel == "bwd_dpair" else [])
            files[f"{kernel}_{name}_sm90.cu"] = _file("sm90/launch.cuh", functions, arguments, "Sm90Params")
    return files


def _file(header, functions, arguments, params="KernelParams") -> str:
    lines = [
        f"template cudaError_t {function}<{argument}>(const {params}&);"
        for function in functions
        for argument in arguments
    ]
    return "\n".join(
        [
            "// SPDX-License-Identifier: Apache-2.0",
            "// Written by generate_instantiations.py.",
            f'#include "{header}"',
            "",
            "namespace ds4sci {",
            *lines,
            "}  // namespace ds4sci",
            "",
        ]
    )


def main() -> None:
    folder = Path(__file__).parent / "instantiations"
    folder.mkdir(exist_ok=True)
    files = instantiations()
    for stale in {path.name for path in folder.glob("*.cu")} - set(files):
        (folder / stale).unlink()
    for name, content in files.items():
        (folder / name).write_text(content)


if __name__ == "__main__":
    main()

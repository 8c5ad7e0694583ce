# SPDX-License-Identifier: Apache-2.0
"""Write instantiations/*.cu: one kernel family, head dim and dtype per file, so that they compile in parallel.

Run it after a change here; a test asserts that the folder equals what this script writes.
"""

from pathlib import Path

HEAD_DIMS = (16, 32, 48, 64, 128)
DTYPES = {"fp16": "fp16", "bf16": "bf16", "fp32": "float"}
KERNELS = ("fwd", "bwd_dq", "bwd_dkv", "bwd_dpair")
HEADER = "// SPDX-License-Identifier: Apache-2.0\n// Written by generate_instantiations.py.\n"


def instantiations() -> dict[str, str]:
    """File name -> content."""
    files = {}
    for name, element in DTYPES.items():
        files[f"prepare_{name}.cu"] = _file("prepare_launch.cuh", "run_prepare", element)
        for kernel in KERNELS:
            for head_dim in HEAD_DIMS:
                files[f"{kernel}_hdim{head_dim}_{name}.cu"] = _file(
                    "sm80/launch.cuh", f"run_evoformer_{kernel}", f"{element}, {head_dim}"
                )
    return files


def _file(header: str, function: str, arguments: str) -> str:
    return (
        f'{HEADER}#include "{header}"\n\nnamespace ds4sci {{\n'
        f"template cudaError_t {function}<{arguments}>(const KernelParams&);\n}}  // namespace ds4sci\n"
    )


def main() -> None:
    folder = Path(__file__).parent / "instantiations"
    folder.mkdir(exist_ok=True)
    files = instantiations()
    for stale in set(path.name for path in folder.glob("*.cu")) - set(files):
        (folder / stale).unlink()
    for name, content in files.items():
        (folder / name).write_text(content)


if __name__ == "__main__":
    main()

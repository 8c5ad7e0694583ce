# SPDX-License-Identifier: Apache-2.0
"""`make build`: compiles every kernel for every supported architecture and refuses spills and serialised wgmma.

    python -m deepspeed_ds4sci.op_builder.compile_check [--targets "8.0;9.0a"] [--all]

Needs nvcc but no GPU. Exit code 0: all kernels are clean; 1: at least one is not, or it does not compile; 2: it could
not be tried (nvcc or ninja is missing, or does not know an architecture).
"""

import argparse
import re
import sys
import time
from pathlib import Path

from .compile import BuildError, compile_steps, require_tools, run_steps
from .library import LIBRARIES
from .ptxas import demangle, parse_ptxas
from .targets import ALL_TARGETS, parse_targets


def compile_for_check(library, targets, nvcc, ninja, folder):
    """Compiles each source for all targets at once, which is what the library's build does; nothing is linked.

    Returns:
        list of Kernel.

    Raises:
        BuildError: a source does not compile; the message holds what the compiler said.
    """
    steps = compile_steps(library, targets, nvcc, folder / "objects", ("-Xptxas", "-v"), keep_log=True)
    print(f"{library.name}: compiling {len(steps)} sources for {', '.join(map(str, targets))}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run_steps(steps, folder, ninja, keep_going=True)
    except BuildError as error:
        failed = [step for step in steps if not step.output.is_file()]
        said = [f"{Path(step.command[-3]).name}:\n{step.log.read_text()}" for step in failed if step.log.is_file()]
        raise BuildError("\n".join(said) or str(error)) from error
    return [kernel for step in steps for kernel in parse_ptxas(step.log.read_text())]


def table(kernels, names, every_kernel=False):
    """Text table: a row per kernel template and architecture, or with `every_kernel` a row per instantiation."""
    groups = {}
    for kernel in kernels:
        name = names[kernel.symbol]
        groups.setdefault((name if every_kernel else _template_name(name), kernel.arch), []).append(kernel)
    rows = [("kernel", "arch", "count", "registers", "static smem", "local", "spills", "serialised")]
    for (name, arch), members in sorted(groups.items()):
        registers = [kernel.registers for kernel in members]
        rows.append(
            (
                name,
                arch,
                str(len(members)),
                f"{min(registers)}-{max(registers)}",
                str(max(kernel.shared_bytes for kernel in members)),
                str(max(kernel.local_bytes for kernel in members)),
                str(max(kernel.spill_bytes for kernel in members)),
                str(sum(bool(kernel.losses) for kernel in members)),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _template_name(name):
    """`void space::kernel<32, true>(Params)` -> `kernel`."""
    head = re.split(r"[<(]", name.replace("(anonymous namespace)::", ""))[0]
    return head.split()[-1].split("::")[-1]


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="compile_check", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=ALL_TARGETS, help="architectures, as in TORCH_CUDA_ARCH_LIST")
    parser.add_argument("--folder", default="build/compile_check", help="where objects and logs are kept")
    parser.add_argument("--all", action="store_true", help="a row per kernel instantiation")
    options = parser.parse_args(arguments)

    try:
        targets = parse_targets(options.targets)
    except ValueError as error:
        parser.error(str(error))
    try:
        nvcc, ninja = require_tools()
    except BuildError as error:
        print(f"compile check FAILED: {error}")
        return 2
    unknown = nvcc.unsupported(targets)
    if unknown:
        version = "{}.{}".format(*nvcc.version)
        print(f"compile check FAILED: {nvcc.path} (CUDA {version}) cannot compile for {', '.join(map(str, unknown))}")
        return 2

    status = 0
    for library in LIBRARIES:
        start = time.monotonic()
        folder = Path(options.folder).absolute() / library.name
        try:
            kernels = compile_for_check(library, targets, nvcc, ninja, folder)
        except (BuildError, FileNotFoundError) as error:
            print(f"{library.name}: compile check FAILED\n{error}")
            status = 1
            continue
        names = demangle({kernel.symbol for kernel in kernels})
        print(table(kernels, names, options.all))
        bad = [kernel for kernel in kernels if kernel.problems()]
        for kernel in bad:
            print(f"{kernel.arch} {names[kernel.symbol]}: {'; '.join(kernel.problems())}")
        if bad or not kernels:
            status = 1
        verdict = f"{len(bad)} with problems" if bad else "no spills, no local memory, no serialised wgmma"
        print(
            f"{library.name}: {len(kernels)} kernels with nvcc {'.'.join(map(str, nvcc.version))} "
            f"in {time.monotonic() - start:.0f} s: {verdict}"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())

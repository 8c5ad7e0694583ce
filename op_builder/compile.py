# SPDX-License-Identifier: Apache-2.0
"""Turns a Library into a shared object with nvcc and ninja: one object per source, then one link.

Used alike by the just-in-time build, the ahead-of-time build and the compile check. Objects are named after a hash of
everything that goes into them and appear by renaming, so that an interrupted or doubled build leaves nothing half
written, and editing one source recompiles that source only.
"""

import hashlib
import json
import mmap
import os
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from .library import NVCC_FLAGS
from .lock import build_lock
from .nvcc import SEARCHED, find_ninja, find_nvcc

# Sources that use Hopper-only instructions are compiled for this target alone.
SM90_STEM = "_sm90"
SM90_ARCH = "90a"

_INFO_MARKER = b"DS4SCI_BUILD_INFO:"
_DEFAULT_TIMEOUT_S = 1800


class BuildError(RuntimeError):
    """The library cannot be compiled: something is missing, or the compiler said no."""


@dataclass(frozen=True)
class Step:
    """One command that writes one file. `{out}` in the command stands for the file while it is being written."""

    output: Path
    command: tuple[str, ...]
    inputs: tuple[Path, ...] = ()
    log: Path | None = None
    """File for the command's output; None: shown with the build's own."""


def digest(*parts):
    """Short hash of strings, bytes and files (paths count by content)."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()[:16]


def source_digest(library):
    """Hash of the library's sources, headers and compiler flags: a prebuilt library with another one is stale."""
    folder = library.include_dir()
    files = [*library.sources(), *library.headers()]
    return digest(*NVCC_FLAGS, *(part for path in files for part in (str(path.relative_to(folder)), path)))


def require_tools():
    """The compiler and the ninja program.

    Raises:
        BuildError: one of them is missing.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(f"nvcc was not found in {SEARCHED}; install the CUDA toolkit or set CUDA_HOME")
    ninja = find_ninja()
    if ninja is None:
        raise BuildError("ninja was not found; pip install ninja")
    return nvcc, ninja


def compile_steps(library, targets, nvcc, objects_dir, extra_flags=(), keep_log=False):
    """The steps that compile each source of the library for those of the targets that it supports."""
    headers = digest(*library.headers())
    with_sm90 = any(target.arch == SM90_ARCH for target in targets)
    steps = []
    for source in library.sources():
        sm90_only = source.stem.endswith(SM90_STEM)
        if sm90_only and not with_sm90:
            continue
        gencode = [
            flag
            for target in targets
            if not sm90_only or target.arch == SM90_ARCH
            for flag in target.gencode_flags()[: 1 if sm90_only else None]
        ]
        flags = [*NVCC_FLAGS, *extra_flags, *gencode, f"-I{library.include_dir()}"]
        if with_sm90:
            flags.append("-DDS4SCI_WITH_SM90")
        key = digest(headers, source, nvcc.banner, _nvcc_environment(), *NVCC_FLAGS, *extra_flags, *gencode)
        output = objects_dir / f"{source.stem}-{key}.o"
        steps.append(
            Step(
                output=output,
                command=(nvcc.path, *flags, "-c", str(source), "-o", "{out}"),
                log=output.with_suffix(".log") if keep_log else None,
            )
        )
    return steps


def build_library(library, targets, root):
    """Compiles the library into the folder `root` unless it is there already. Safe in any number of processes at once.

    Args:
        library: what to build.
        targets: list of Target.
        root: folder for objects and libraries of this name; created.

    Returns:
        Path of the shared object.

    Raises:
        BuildError: a tool is missing, the compiler does not know a target, the compilation failed, or it would have to
            write into a folder of another user.
        TimeoutError: another process held the build for longer than DS4SCI_BUILD_TIMEOUT seconds (default 1800).
    """
    nvcc, ninja = require_tools()
    root = Path(root).absolute()  # ninja runs in another folder
    output = planned_library(library, targets, nvcc, root)
    if os.path.isfile(output):  # False too where another user's folder may not be looked into
        return output
    unsupported = nvcc.unsupported(targets)
    if unsupported:
        names = ", ".join(str(target) for target in unsupported)
        raise BuildError(f"{nvcc.path} (CUDA {nvcc.version[0]}.{nvcc.version[1]}) cannot compile for {names}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"cannot create {output.parent}: {error}; set DS4SCI_CACHE_DIR to a writable folder"
        ) from error
    failure = output.with_suffix(".failed")
    start = time.time()
    with build_lock(output.with_suffix(".lock"), timeout_s=_timeout_s()) as may_build:
        if output.is_file():
            return output
        # One rank's failure is every rank's: those that waited for it must not compile the same error again.
        if failure.is_file() and failure.stat().st_mtime >= start:
            raise BuildError(failure.read_text())
        if not may_build:
            raise BuildError(
                f"{output.parent} belongs to another user, who has not built {library.name} there; "
                "set DS4SCI_CACHE_DIR to a writable folder"
            )
        try:
            _compile_and_link(library, targets, nvcc, ninja, root, output)
        except BuildError as error:
            failure.write_text(str(error))
            raise
    return output


def planned_library(library, targets, nvcc, root):
    """Where `build_library` puts its result for these inputs, whether or not it is there yet."""
    names = [str(target) for target in targets]
    key = digest(source_digest(library), nvcc.banner, _nvcc_environment(), *names)
    return Path(root) / key / f"{library.name}.so"


def _compile_and_link(library, targets, nvcc, ninja, root, output):
    steps = compile_steps(library, targets, nvcc, root / "objects")
    info = output.parent / "build_info.cpp"
    info.write_text(_info_source(library, targets, nvcc))
    info_object = output.parent / "build_info.o"
    steps.append(Step(info_object, (nvcc.path, "-Xcompiler", "-fPIC", "-c", str(info), "-o", "{out}"), (info,)))
    objects = tuple(step.output for step in steps)
    link = (nvcc.path, "-shared", "-cudart", "static", *map(str, objects), "-o", "{out}")
    run_steps([*steps, Step(output, link, objects)], output.parent, ninja)


def run_steps(steps, folder, ninja, keep_going=False):
    """Runs the steps whose output is missing, in parallel (MAX_JOBS at once, default one per core).

    Raises:
        BuildError: a command failed; carries the end of its output. All of it is in `folder`/build.log.
    """
    lines = ["rule run", "  command = $cmd", "  description = $out", ""]
    for step in steps:
        if step.output.is_file():
            continue
        step.output.parent.mkdir(parents=True, exist_ok=True)
        inputs = " ".join(_ninja_path(path) for path in step.inputs)
        lines += [f"build {_ninja_path(step.output)}: run {inputs}".rstrip(), f"  cmd = {_shell_command(step)}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    command = [ninja, "-C", str(folder), "-j", jobs, *(["-k", "0"] if keep_going else [])]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    )
    (folder / "build.log").write_text(done.stdout)
    if done.returncode != 0:
        tail = done.stdout[-4000:]
        raise BuildError(f"the compilation failed; full output in {folder / 'build.log'}; its end:\n{tail}")


def _shell_command(step):
    """The step as one shell line, escaped for ninja. The file gets its name only once it is complete."""
    partial = f"{step.output}.{os.getpid()}.partial"
    line = shlex.join(part.replace("{out}", partial) for part in step.command)
    if step.log is not None:
        line += f" > {shlex.quote(str(step.log))} 2>&1"
    line += f" && mv -f {shlex.quote(partial)} {shlex.quote(str(step.output))}"
    return line.replace("$", "$$")


def _ninja_path(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _info_source(library, targets, nvcc):
    info = {
        "sources": source_digest(library),
        "targets": [str(target) for target in targets],
        "nvcc": "{}.{}".format(*nvcc.version),
    }
    text = json.dumps(info).replace("\\", "\\\\").replace('"', '\\"')
    return f'extern "C" const char ds4sci_build_info[] = "{_INFO_MARKER.decode()}{text}";\n'


def read_build_info(path):
    """What a library was built from, read from the file without loading it.

    Returns:
        dict with "sources" (see source_digest), "targets" (list of str) and "nvcc"; None if it is another file.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.find(_INFO_MARKER)
            if start < 0:
                return None
            start += len(_INFO_MARKER)
            return json.loads(data[start : data.find(b"\0", start)])
    except (OSError, ValueError):
        return None


def _nvcc_environment():
    """Flags that nvcc takes from the environment; part of every cache key."""
    return " ".join(os.environ.get(name, "") for name in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN"))


def _timeout_s():
    text = os.environ.get("DS4SCI_BUILD_TIMEOUT", str(_DEFAULT_TIMEOUT_S))
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"DS4SCI_BUILD_TIMEOUT must be a number of seconds, got {text!r}") from None

# SPDX-License-Identifier: Apache-2.0
"""The build function, with a stand-in for nvcc: what is compiled how often, and what failures say."""

import contextlib
import errno
import os
import re
import subprocess
import sys
import textwrap

import pytest

from deepspeed_ds4sci.op_builder import compile as compile_module
from deepspeed_ds4sci.op_builder.compile import (
    BuildError,
    build_library,
    compile_steps,
    planned_library,
    read_build_info,
    require_tools,
    source_digest,
)
from deepspeed_ds4sci.op_builder.library import EVOFORMER_ATTN, NVCC_FLAGS, csrc_dir
from deepspeed_ds4sci.op_builder.nvcc import find_nvcc
from deepspeed_ds4sci.op_builder.targets import parse_targets
from tests.helpers.fake_nvcc import FakeNvcc, write_sources
from tests.helpers.processes import clean_environment

AMPERE = parse_targets("8.0")
HOPPER = parse_targets("8.0;9.0a")


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    fake = FakeNvcc(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(fake.home))
    return fake


@pytest.fixture
def library(tmp_path):
    return write_sources(tmp_path / "csrc")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache" / "with a space"


def test_sources_of_the_evoformer_op():
    assert EVOFORMER_ATTN.include_dir() == csrc_dir() / "evoformer_attn"
    assert EVOFORMER_ATTN.sources()[0].name == "api.cu"
    assert not any("fast" in flag for flag in NVCC_FLAGS)


def test_missing_sources_are_named(tmp_path):
    library = write_sources(tmp_path / "csrc")
    (tmp_path / "csrc" / "api.cu").unlink()
    with pytest.raises(FileNotFoundError, match="cannot build ds4sci_evoformer_attn: .*api.cu is missing"):
        library.sources()


def test_builds_once(library, nvcc, root):
    path = build_library(library, AMPERE, root)
    assert path == planned_library(library, AMPERE, find_nvcc(), root)
    assert nvcc.compiled() == ["api.cu", "fwd.cu"]
    calls = len(nvcc.calls())
    assert build_library(library, AMPERE, root) == path
    assert len(nvcc.calls()) == calls


def test_relative_folder(library, nvcc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build_library(library, AMPERE, "cache").is_file()


def test_command_lines(library, nvcc, root):
    build_library(library, HOPPER, root)
    (api,) = [line for line in nvcc.calls() if "api.cu" in line]
    for flag in (*NVCC_FLAGS, f"-I{library.root}", "-DDS4SCI_WITH_SM90", "-gencode=arch=compute_80,code=sm_80"):
        assert flag in api.split()
    (link,) = [line for line in nvcc.calls() if "-shared" in line]
    assert "-cudart static" in link
    assert "fast" not in "".join(nvcc.calls())


def test_hopper_sources_are_for_hopper_only(library, nvcc, tmp_path):
    ampere = compile_steps(library, AMPERE, find_nvcc(), tmp_path)
    assert [step.output.name.rpartition("-")[0] for step in ampere] == ["api", "fwd"]
    assert not any("-DDS4SCI_WITH_SM90" in step.command for step in ampere)
    *_, hopper = compile_steps(library, parse_targets("8.0;9.0a+PTX"), find_nvcc(), tmp_path)
    gencode = [flag for flag in hopper.command if flag.startswith("-gencode")]
    assert gencode == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_build_info(library, nvcc, root):
    info = read_build_info(build_library(library, HOPPER, root))
    assert info == {"sources": source_digest(library), "targets": ["8.0", "9.0a"], "nvcc": "12.9"}


@pytest.mark.parametrize("content", [b"", b"\x7fELF and so on", b"DS4SCI_BUILD_INFO:not json\0"])
def test_build_info_of_another_file(tmp_path, content):
    path = tmp_path / "other.so"
    path.write_bytes(content)
    assert read_build_info(path) is None
    assert read_build_info(tmp_path / "missing.so") is None


def test_one_edited_source_is_one_compilation(library, nvcc, root):
    first = build_library(library, AMPERE, root)
    (library.include_dir() / "instantiations" / "fwd.cu").write_text("// forward, faster\n")
    second = build_library(library, AMPERE, root)
    assert second != first
    assert nvcc.compiled() == ["api.cu", "fwd.cu", "fwd.cu"]


@pytest.mark.parametrize("change", ["header", "targets", "compiler", "environment"])
def test_cache_is_not_used_after_a_change(library, nvcc, root, monkeypatch, tmp_path, change):
    first = build_library(library, AMPERE, root)
    targets = AMPERE
    if change == "header":
        (library.include_dir() / "tile.cuh").write_text("// larger tile\n")
    elif change == "targets":
        targets = parse_targets("8.6")
    elif change == "compiler":
        nvcc = FakeNvcc(tmp_path / "cuda13", release="13.0")
        monkeypatch.setenv("CUDA_HOME", str(nvcc.home))
    else:
        monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    before = len(nvcc.compiled())
    assert build_library(library, targets, root) != first
    assert nvcc.compiled()[before:] != []
    assert len(nvcc.compiled()) - before == 2


def test_half_written_objects_are_not_used(library, nvcc, root):
    steps = compile_steps(library, AMPERE, find_nvcc(), root / "objects")
    steps[0].output.parent.mkdir(parents=True)
    partial = steps[0].output.with_name(f"{steps[0].output.name}.123.partial")
    partial.write_text("half")
    build_library(library, AMPERE, root)
    assert steps[0].output.read_text() == "// api\n"


def test_compiler_error_is_shown(library, nvcc, root):
    (library.include_dir() / "api.cu").write_text("syntax error\n")
    with pytest.raises(BuildError, match="the compilation failed; full output in .*build.log") as caught:
        build_library(library, AMPERE, root)
    assert "error: expected a ';'" in str(caught.value)


def test_unknown_target_is_named(library, nvcc, root):
    with pytest.raises(BuildError, match=r"bin/nvcc \(CUDA 12.9\) cannot compile for 11.0"):
        build_library(library, parse_targets("8.0;11.0"), root)
    assert nvcc.calls() == []


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(compile_module, "find_ninja", lambda: None)
    monkeypatch.setattr(compile_module, "find_nvcc", lambda: "nvcc")
    with pytest.raises(BuildError, match="ninja was not found; pip install ninja"):
        require_tools()
    monkeypatch.setattr(compile_module, "find_nvcc", lambda: None)
    with pytest.raises(
        BuildError, match="nvcc was not found in CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda; install"
    ):
        require_tools()


def test_unwritable_cache_names_the_variable(library, nvcc, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match=r"cannot create .*; set DS4SCI_CACHE_DIR"):
        build_library(library, AMPERE, tmp_path / "file" / "cache")


@pytest.fixture
def not_permitted(monkeypatch):
    """The lock is another user's: it can be waited for, not held."""

    @contextlib.contextmanager
    def lock(path, timeout_s):
        if lock.then_built:
            path.with_suffix(".so").write_text("built by the other user")
        yield False

    lock.then_built = False
    monkeypatch.setattr(compile_module, "build_lock", lock)
    return lock


def test_what_another_user_has_built_meanwhile_is_taken(library, nvcc, root, not_permitted):
    not_permitted.then_built = True
    assert build_library(library, AMPERE, root).read_text() == "built by the other user"
    assert nvcc.calls() == []


def test_unfinished_build_of_another_user_names_the_variable(library, nvcc, root, not_permitted):
    folder = re.escape(str(planned_library(library, AMPERE, find_nvcc(), root).parent))
    message = f"{folder} belongs to another user, who has not built ds4sci_evoformer_attn there; set DS4SCI_CACHE_DIR"
    with pytest.raises(BuildError, match=message):
        build_library(library, AMPERE, root)
    assert nvcc.calls() == []


def test_closed_cache_of_another_user_names_the_variable(library, nvcc, root, monkeypatch):
    """Whoever may not look into a folder cannot ask whether a file is there either."""

    def closed(own):
        def method(path, *rest, **options):
            if path.is_relative_to(root):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return own(path, *rest, **options)

        return method

    for name in ("mkdir", "is_file", "is_dir"):
        monkeypatch.setattr(compile_module.Path, name, closed(getattr(compile_module.Path, name)))
    with pytest.raises(BuildError, match=r"cannot create .*Permission denied.*; set DS4SCI_CACHE_DIR"):
        build_library(library, AMPERE, root)


def test_bad_timeout_is_named(library, nvcc, root, monkeypatch):
    monkeypatch.setenv("DS4SCI_BUILD_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="DS4SCI_BUILD_TIMEOUT must be a number of seconds, got 'soon'"):
        build_library(library, AMPERE, root)


_BUILD = """
    import sys
    from deepspeed_ds4sci.op_builder.compile import build_library
    from deepspeed_ds4sci.op_builder.targets import parse_targets
    from tests.helpers.fake_nvcc import FolderLibrary
    library = FolderLibrary("ds4sci_evoformer_attn", "", "X", root=sys.argv[1])
    try:
        print(build_library(library, parse_targets("8.0"), sys.argv[2]))
    except Exception as error:
        print(type(error).__name__, "expected a" in str(error))
"""


def build_in_eight_processes(library, root, nvcc):
    environment = clean_environment(CUDA_HOME=nvcc.home, FAKE_NVCC_SECONDS="0.3", PYTHONPATH=os.getcwd())
    command = [sys.executable, "-c", textwrap.dedent(_BUILD), str(library.root), str(root)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(8)]
    return [rank.communicate(timeout=120)[0].splitlines()[-1] for rank in ranks]


def test_eight_ranks_build_once(library, nvcc, root):
    assert build_in_eight_processes(library, root, nvcc) == 8 * [str(build_library(library, AMPERE, root))]
    assert nvcc.compiled() == ["api.cu", "fwd.cu"]


def test_eight_ranks_fail_once(library, nvcc, root):
    """One rank's failure is the others' too: they do not compile the same error one after the other."""
    (library.include_dir() / "api.cu").write_text("syntax error\n")
    assert build_in_eight_processes(library, root, nvcc) == 8 * ["BuildError True"]
    # A rank that starts after the failure tries again; the eight do not start at exactly the same time.
    assert nvcc.compiled().count("api.cu") < 4


def test_failure_is_forgotten_by_the_next_start(library, nvcc, root):
    (library.include_dir() / "api.cu").write_text("syntax error\n")
    with pytest.raises(BuildError):
        build_library(library, AMPERE, root)
    (nvcc.home / "bin" / "nvcc").write_text((nvcc.home / "bin" / "nvcc").read_text().replace("syntax error", "none"))
    assert build_library(library, AMPERE, root).is_file()

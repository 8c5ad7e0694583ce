# SPDX-License-Identifier: Apache-2.0
"""Reading the compiler's report, and the verdict of `make build`."""

import pytest

from deepspeed_ds4sci.op_builder import compile_check, ptxas
from deepspeed_ds4sci.op_builder.ptxas import demangle, parse_ptxas
from tests.helpers.fake_nvcc import FakeNvcc, write_sources

CLEAN = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3fwdILi32EEvPf' for 'sm_80'
ptxas info    : Function properties for _Z3fwdILi32EEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 256 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 5.924 ms
"""
SPILL = """
ptxas info    : Compiling entry function '_Z3bwdILi64EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z3bwdILi64EEvPf
    24 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size
"""
LOCAL_ARRAY = """
ptxas info    : Compiling entry function '_Z3arrPf' for 'sm_80'
ptxas info    : Function properties for _Z3arrPf
    256 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 80 registers, 256 bytes cumulative stack size, 360 bytes cmem[0]
"""
OLD_LOCAL = """
ptxas info    : Compiling entry function '_Z3arrPf' for 'sm_80'
ptxas info    : Used 80 registers, 44 bytes lmem, 360 bytes cmem[0]
"""
DEVICE_FUNCTION = """
ptxas info    : Compiling entry function '_Z4callPf' for 'sm_80'
ptxas info    : Function properties for _Z4callPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
ptxas info    : Function properties for _Z6helperPf
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
SERIALISED = {
    "C7510": "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline in the function '_Z3fwdILi32EEvPf'",
    "C7514": "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "non wgmma instructions defining accumulator registers of a wgmma in the function '_Z3fwdILi32EEvPf'",
    "setmaxnreg": "ptxas info    : Potential Performance Loss: 'setmaxnreg' ignored; unable to determine registers",
}


def test_clean_kernel():
    (kernel,) = parse_ptxas(CLEAN)
    assert (kernel.symbol, kernel.arch) == ("_Z3fwdILi32EEvPf", "sm_80")
    assert (kernel.registers, kernel.shared_bytes, kernel.local_bytes, kernel.spill_bytes) == (168, 256, 0, 0)
    assert kernel.problems() == []


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (SPILL, ["spills 28 bytes of registers", "uses 24 bytes of local memory"]),
        (LOCAL_ARRAY, ["uses 256 bytes of local memory"]),
        (OLD_LOCAL, ["uses 44 bytes of local memory"]),
        (DEVICE_FUNCTION, ["spills 8 bytes of registers", "uses 8 bytes of local memory"]),
    ],
)
def test_local_memory(text, problems):
    (kernel,) = parse_ptxas(text)
    assert kernel.problems() == problems


def test_kernels_are_kept_apart():
    kernels = parse_ptxas(CLEAN + SPILL + CLEAN)
    assert [bool(kernel.problems()) for kernel in kernels] == [False, True, False]


@pytest.mark.parametrize("code", SERIALISED)
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_serialised_wgmma(code, before):
    text = f"{SERIALISED[code]}\n{CLEAN}" if before else f"{CLEAN}\n{SERIALISED[code]}"
    (kernel,) = parse_ptxas(text)
    (problem,) = kernel.problems()
    assert "Performance Loss" in problem


def test_an_added_fence_is_no_loss():
    fence = "ptxas info    : (C7519) warpgroup.arrive is injected in around line 733 by compiler to allow use of "
    (kernel,) = parse_ptxas(f"{fence}registers in GMMA in function '_Z3fwdILi32EEvPf'\n{CLEAN}")
    assert kernel.problems() == []


def test_serialised_wgmma_belongs_to_the_kernel_it_names():
    hopper = CLEAN.replace("sm_80", "sm_90a")
    kernels = parse_ptxas(CLEAN + hopper + SERIALISED["C7514"] + SPILL)
    assert [len(kernel.losses) for kernel in kernels] == [0, 1, 0]


def test_serialised_wgmma_without_a_kernel_is_not_lost():
    (kernel,) = parse_ptxas(SERIALISED["setmaxnreg"])
    assert kernel.symbol == "(unknown)"
    assert kernel.problems()


def test_demangle(monkeypatch):
    monkeypatch.setattr(ptxas.shutil, "which", lambda name: None)
    assert demangle(["_Z3arrPf"]) == {"_Z3arrPf": "_Z3arrPf"}
    assert demangle([]) == {}


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Runs the check over small sources; an instantiation's text is what the compiler says about it."""
    nvcc = FakeNvcc(tmp_path / "cuda")
    script = nvcc.home / "bin" / "nvcc"
    script.write_text(script.read_text() + "cat $inputs\n")
    monkeypatch.setenv("CUDA_HOME", str(nvcc.home))
    library = write_sources(tmp_path / "csrc")
    monkeypatch.setattr(compile_check, "LIBRARIES", (library,))

    def run(said=CLEAN, *arguments):
        (library.include_dir() / "instantiations" / "fwd.cu").write_text(said)
        status = compile_check.main(["--folder", str(tmp_path / "out"), *arguments])
        return status, capsys.readouterr().out

    return run


def test_check_passes_clean_kernels(check):
    status, output = check()
    assert status == 0
    assert "1 kernels with nvcc 12.9 in" in output
    assert "no spills, no local memory, no serialised wgmma" in output
    assert "168-168" in output


@pytest.mark.parametrize("said", [SPILL, LOCAL_ARRAY, CLEAN + SERIALISED["C7510"], CLEAN + SPILL])
def test_check_refuses(check, said):
    status, output = check(said)
    assert status == 1
    assert "1 with problems" in output


def test_check_refuses_on_the_second_run_too(check):
    """The objects are there already then; their logs must still be read."""
    assert check(SPILL)[0] == 1
    assert check(SPILL)[0] == 1


def test_check_refuses_nothing_compiled(check):
    assert check("")[0] == 1


def test_check_shows_compiler_errors(check):
    status, output = check("syntax error")
    assert status == 1
    assert "fwd.cu:" in output
    assert "error: expected a ';'" in output


def test_check_lists_every_instantiation(check):
    two = CLEAN + CLEAN.replace("32E", "64E")
    assert "fwd" in check(two)[1]
    assert check(two, "--all")[1].count("sm_80") == 2


def test_check_needs_nvcc(check, monkeypatch):
    monkeypatch.setattr("deepspeed_ds4sci.op_builder.compile.find_nvcc", lambda: None)
    status, output = check()
    assert status == 2
    assert "compile check FAILED: nvcc was not found" in output


def test_check_needs_an_nvcc_that_knows_the_targets(check):
    status, output = check(CLEAN, "--targets", "8.0;11.0")
    assert status == 2
    assert "cannot compile for 11.0" in output


def test_check_names_a_bad_target(check, capsys):
    with pytest.raises(SystemExit, match="2"):
        check(CLEAN, "--targets", "Hopper")
    assert "must list architectures" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""Preparation of the peers, the sanitizer's driver, the profiler's program and the session script."""

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from tests.benchmarks import deepspeed_tolerance, once, prepare_peers, sanitize
from tests.benchmarks.sanitize import DTYPES, HEAD_DIMS, VARIANTS, cases

HERE = Path(__file__).resolve().parent
SESSION = HERE / "gpu_session.sh"


def test_recompressed_wheel_holds_the_same_files(tmp_path):
    wheel = tmp_path / "a-1-py3-none-any.whl"
    content = {"a/lib.so": b"x" * 100_000, "a-1.dist-info/RECORD": b"a/lib.so,,\n"}
    with zipfile.ZipFile(wheel, "w") as file:
        for name, data in content.items():
            file.writestr(name, data)
    prepare_peers.recompress(wheel)
    assert wheel.stat().st_size < 2000
    with zipfile.ZipFile(wheel) as file:
        assert {name: file.read(name) for name in file.namelist()} == content


def test_only_missing_or_too_old_wheels_are_installed(monkeypatch):
    installed = {"typing_inspection": "0.4.5", "setuptools": "70.1"}

    def version(name):
        if name in installed:
            return installed[name]
        raise prepare_peers.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(prepare_peers.importlib.metadata, "version", version)
    assert not prepare_peers.is_missing(Path("typing_inspection-0.4.5-py3-none-any.whl"))
    assert prepare_peers.is_missing(Path("setuptools-80.9.0-py3-none-any.whl"))
    assert prepare_peers.is_missing(Path("hjson-3.1.0-py3-none-any.whl"))


def test_install_asks_no_registry_and_survives_a_bad_wheel(monkeypatch, tmp_path, capsys):
    (tmp_path / "no_such_project-1-py3-none-any.whl").write_bytes(b"not a wheel")
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "ds4sci-probe"\nversion = "1"\n[tool.setuptools]\npy-modules = ["ds4sci_probe"]\n'
    )
    (project / "ds4sci_probe.py").write_text("answer = 42\n")
    monkeypatch.setattr(prepare_peers, "ROOT", project)
    prepare_peers.install(tmp_path, tmp_path / "venv")
    assert "COULD NOT INSTALL no_such_project-1-py3-none-any.whl" in capsys.readouterr().out
    code = "import ds4sci_probe, torch; print(ds4sci_probe.answer)"  # torch: of the interpreter below
    found = subprocess.run([tmp_path / "venv" / "bin" / "python", "-c", code], capture_output=True, text=True)
    assert found.stdout == "42\n", found.stderr


def test_sources_of_deepspeed_are_where_the_launchers_expect_them():
    folder = prepare_peers.deepspeed_sources()
    for launcher, source in (("forward.cu", "attention_cu.cu"), ("backward.cu", "attention_back.cu")):
        assert f'#include "{source}"' in (HERE / "deepspeed_op" / launcher).read_text()
        assert (folder / source).is_file()


STAND_IN_PROGRAM = """
#include <torch/extension.h>
#include <cstdio>
static void* give(int64_t bytes) { static char memory[64]; return bytes == 40 ? memory : nullptr; }
int main() {
    torch::Tensor t{nullptr, 5, {2, 3, 4, 5, 8}, {480, 160, 40, 8, 1}, 1};
    torch::Tensor v = t.view({-1, 4, 5, 8});
    bool ok = v.dims == 4 && v.size(0) == 6 && v.size(-1) == 8 && v.stride(-4) == 160 && v.stride(-2) == 8;
    torch::Tensor one{nullptr, 2, {1, 8}, {0, 1}, 2};
    ok = ok && one.view({8}).size(0) == 8;
    torch::allocate() = give;
    ok = ok && torch::empty(10, one.options()).data_ptr<float>() != nullptr;
    ok = ok && torch::empty(0, one.options()).data == nullptr;
    torch::Tensor strided{nullptr, 2, {4, 8}, {16, 1}, 1};
    try { strided.view({32}); ok = false; } catch (const std::exception& error) { std::puts(error.what()); }
    return ok ? 0 : 1;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_stand_in_tensor_behaves_like_torch(tmp_path):
    source = tmp_path / "stand_in.cpp"
    source.write_text(STAND_IN_PROGRAM)
    program = tmp_path / "stand_in"
    include = HERE / "deepspeed_op" / "stand_in"
    subprocess.run(["g++", "-std=c++20", f"-I{include}", source, "-o", program], check=True)
    finished = subprocess.run([program], capture_output=True, text=True)
    assert finished.returncode == 0 and "is not contiguous" in finished.stdout


def test_sanitizer_cases_cover_dtypes_head_dims_and_variants():
    listed = cases()
    for dtype in DTYPES:
        assert {small.head_dim for kind, small in listed if kind == dtype} >= set(HEAD_DIMS)
        assert [small for kind, small in listed if kind == dtype and small in VARIANTS] == list(VARIANTS)


@pytest.mark.parametrize("small", VARIANTS, ids=str)
def test_sanitizer_cases_run(small):
    sanitize.run(torch.float32, small, "reference", "cpu")


def test_sanitizer_runs_the_cases_that_match(capsys):
    matching = [case for case in cases() if "rows=420" in str(case[1])]
    sanitize.main(["--impl", "tiled", "--device", "cpu", "--matching", "rows=420"])
    assert f"{len(matching)} of {len(matching)} cases ran" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sanitize.main(["--device", "cpu", "--matching", "nothing like it"])
    assert "no case contains 'nothing like it'" in capsys.readouterr().err


def test_sanitizer_runs_what_each_implementation_takes(capsys, monkeypatch):
    monkeypatch.setattr(sanitize, "cases", lambda: [(torch.float32, small) for small in VARIANTS])
    sanitize.main(["--impl", "tiled,reference", "--device", "cpu", "--quick"])
    all_of_them = f"{len(VARIANTS[::4])} of {len(VARIANTS[::4])} cases ran"
    assert capsys.readouterr().out == f"tiled: {all_of_them}\nreference: {all_of_them}\n"
    with pytest.raises(SystemExit, match="sm90 takes none of the cases on cpu"):
        sanitize.main(["--impl", "sm90", "--device", "cpu"])
    with pytest.raises(SystemExit, match="none of sm90, sm80 takes any case on cpu"):
        sanitize.main(["--device", "cpu"])


def test_sanitizer_fills_outputs_only_while_it_runs(monkeypatch):
    seen = []

    def run(dtype, small, name, device):
        seen.append(bool((torch.empty_like(torch.ones(4096)) == 0).all()))
        return True

    monkeypatch.setattr(sanitize, "run", run)
    empty_like = torch.empty_like
    sanitize.main(["--impl", "tiled", "--device", "cpu", "--quick", "--fill-outputs"])
    assert seen and all(seen) and torch.empty_like is empty_like


def test_sanitizer_stops_at_what_is_not_finite(monkeypatch):
    def broken(q, k, v, **options):
        return q * float("nan") + 0 * (k.sum() + v.sum() + sum(x.float().sum() for x in list(options.values())[:2]))

    monkeypatch.setattr(sanitize, "evoformer_attention", broken)
    with pytest.raises(RuntimeError, match="not finite"):
        sanitize.run(torch.float32, sanitize.Small(), "reference", "cpu")


def test_profiled_program(capsys):
    once.main(["small-pairformer", "--device", "cpu", "--impl", "reference", "--dtype", "fp32", "--runs", "1"])
    assert "ours[reference] ran fwd+bwd on small-pairformer 1 times" in capsys.readouterr().out
    once.main(["small-diffusion", "--device", "cpu", "--peer", "sdpa", "--pass", "fwd", "--dtype", "fp32"])
    assert "sdpa ran fwd on small-diffusion 2 times" in capsys.readouterr().out


def session(*stages: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SESSION), *stages], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_session_names_its_stages(tmp_path):
    finished = session(OUT=str(tmp_path))
    stages = "setup build report test sanitize bench memory host block profile"
    assert finished.returncode == 2 and stages in finished.stderr
    finished = session("bench", "nosuch", OUT=str(tmp_path))
    assert finished.returncode == 2 and "unknown stage nosuch" in finished.stderr


FAKE_PYTHON = """#!/bin/sh
case "$2" in
    deepspeed_ds4sci.report) exit 3 ;;
    pytest) sleep 30 ;;
esac
"""


def test_session_goes_on_after_a_failure_and_counts_it(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    out = tmp_path / "out"
    finished = session("report", "test", "bench", OUT=str(out), PYTHON=str(python), LIMIT_TEST="1")
    assert finished.returncode == 2
    summary = [line.split() for line in finished.stdout.split("=== summary\n")[1].splitlines()]
    words = [" ".join(line[:-2]) for line in summary]  # without the seconds
    assert words == ["report failed (3)", "test ran out of time", "bench ok"]
    assert "=== summary" in (out / "session.log").read_text()


def test_deepspeeds_tolerance_passes_what_is_right_and_names_what_is_not(monkeypatch, capsys, tmp_path):
    """The judge itself: our op and the exact result pass at a size where roundings are small; a wrong dk is named."""

    def with_wrong_dk(inputs):
        found = deepspeed_tolerance.exact(inputs)
        found["dk"][0, 0, 0, 0, 0] += 1
        return found

    real = deepspeed_tolerance.contestants
    monkeypatch.setattr(deepspeed_tolerance, "contestants", lambda *where: {**real(*where), "wrong": with_wrong_dk})
    record = tmp_path / "record.json"
    deepspeed_tolerance.main(["--tiny", "--seeds", "2", "--device", "cpu", "--json", str(record)])
    passed = {(line["contestant"], line["dtype"]): line for line in json.loads(record.read_text())["lines"]}
    for dtype in ("fp16", "bf16"):
        assert passed["ours", dtype]["passed"] == passed["exact", dtype]["passed"] == 2
        assert passed["wrong", dtype]["passed"] == 0 and passed["wrong", dtype]["failed"] == {"dk": 2}
    assert "0/2" in capsys.readouterr().out

# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole blocks, on tiny blocks on the CPU."""

import dataclasses
import time

import pytest
import torch

from deepspeed_ds4sci.nn import attention as block_attention
from tests.benchmarks import record, table, tables
from tests.benchmarks.evoformer_block import __main__ as program
from tests.benchmarks.evoformer_block import measure, report, variants
from tests.benchmarks.evoformer_block.measure import BlockBench, errors_of, exact_attention
from tests.benchmarks.evoformer_block.problem import TINY_CASES, Problem
from tests.benchmarks.evoformer_block.variants import VARIANTS, Variant, attention_by
from tests.benchmarks.timing import CpuClock

CPU = torch.device("cpu")
BLOCK, PAIR = (dataclasses.replace(case, dtype="fp32") for case in TINY_CASES.values())
PAIR_OP = block_attention.evoformer_attention


def bench(**changes) -> BlockBench:
    return BlockBench(CPU, CpuClock(), **{"min_ms": 0.1, "limit_s": 200.0, "total_s": 400.0, **changes})


def results_by(attend, case=BLOCK) -> dict[str, torch.Tensor]:
    problem = Problem.of(case, CPU)
    with attention_by(attend):
        return problem.run()


def exact(case=BLOCK) -> dict[str, torch.Tensor]:
    problem = Problem.of(case, CPU).upcast()
    with attention_by(exact_attention):
        return problem.run()


@pytest.mark.parametrize("case", [BLOCK, PAIR], ids=lambda case: case.name)
def test_eager_and_ours_agree_on_everything(case):
    """Ours through the seam, ours without it, eager, the reference: outputs and every gradient."""
    plain = Problem.of(case, CPU).run()
    assert len(plain) == 2 * len(Problem.of(case, CPU).inputs) + len(list(Problem.of(case, CPU).module.parameters()))
    through_seam = results_by(variants.ours(), case)
    for name, expected in plain.items():
        assert torch.equal(through_seam[name], expected), name
    for other in (results_by(variants.ours_gate_apart(), case), results_by(variants.eager(), case), exact(case)):
        for name, expected in plain.items():
            largest = expected.abs().max().clamp_min(0.1)  # some gradients are 0 in theory: a bias of all keys' logits
            assert (other[name] - expected).abs().max() <= 1e-4 * largest, name


def test_reference_in_parts_is_the_reference(monkeypatch):
    whole = exact()
    monkeypatch.setattr(measure, "EXACT_LOGITS", 2 * 2 * 24**2)  # two rows at a time
    parts = exact()
    assert max(errors_of(parts, whole).values()) < 1e-5


def test_flex_computes_the_same_block():
    """Forward only: torch has no backward of FlexAttention on the CPU."""
    problem = Problem.of(BLOCK, CPU)
    with torch.no_grad():
        expected = problem.module(*problem.inputs, *problem.masks)
        with attention_by(variants.flex_by(variants.flex.flex_attention)):
            actual = problem.module(*problem.inputs, *problem.masks)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_deepspeed_gets_its_layout(monkeypatch):
    """Its wrapper is replaced by plain PyTorch that refuses what DeepSpeed's kernels would read wrongly."""

    def wrapper(q, k, v, biases):
        mask, pair = biases
        assert mask.shape == (*q.shape[:2], 1, 1, q.shape[2]) and mask.dtype == q.dtype
        o = variants.eager_attention(*(x.transpose(2, 3) for x in (q, k, v)), mask, pair).transpose(2, 3)
        o.register_hook(lambda grad: gradients.append(grad.is_contiguous()))
        return o.contiguous()

    gradients = []
    monkeypatch.setattr(variants.deepspeed, "own_attention", lambda dtype: wrapper)
    errors = errors_of(results_by(variants.deepspeed_own()), exact())
    assert max(errors.values()) < 1e-5 and len(gradients) == 4


def lost_pair_gradient(q, k, v, keep, pair_bias, gate):
    return variants.ours()(q, k, v, keep, None if pair_bias is None else pair_bias.detach() + 0 * pair_bias, gate)


def without_mask(q, k, v, keep, pair_bias, gate):
    return variants.ours()(q, k, v, torch.ones_like(keep), pair_bias, gate)


def without_gate(q, k, v, keep, pair_bias, gate):
    return variants.ours()(q, k, v, keep, pair_bias, 0 * gate)


@pytest.mark.parametrize(
    ("attend", "named"),
    [
        (lost_pair_gradient, r"dtri_att_(start|end)\.linear\.weight 1\.0"),
        (without_mask, "mha.linear_"),
        (without_gate, r"mha\.linear_g\.weight 1\.0"),
    ],
    ids=["lost pair gradient", "without mask", "without gate"],
)
def test_a_wrong_attention_is_not_timed(attend, named):
    result = bench().measure(PAIR, Variant("bad", lambda: attend))
    assert (result.status, result.timing, result.extra_mib) == ("WRONG", None, None)
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(result.reason)
    worst = max(result.errors.values())
    assert worst > measure.LIMITS["bf16"]  # bf16's wider limit would have seen it too


def test_attention_alone_runs_on_what_the_block_gives():
    problem = Problem.of(BLOCK, CPU)
    calls = measure.recorded_calls(problem, variants.ours())
    shapes = sorted(tuple(tensors[0].shape) for tensors, _, _ in calls)
    assert shapes == [(1, 18, 24, 2, 8), (1, 24, 18, 2, 8), (1, 24, 24, 2, 8), (1, 24, 24, 2, 8)]
    for tensors, leaves, grad_o in calls:
        assert [x.requires_grad for x in tensors if x is not None] == [True] * 3 + [False] + [True] * (len(leaves) - 3)
        assert tensors[-1].shape == tensors[0].shape  # the gate
        assert grad_o.shape == tensors[0].shape
    strides = {tensors[0].stride()[1:3] for tensors, _, _ in calls}
    assert (16, 24 * 16) in strides  # the ending node and the columns: views, as in the block


def test_peers_that_cannot_run_are_results(monkeypatch):
    def out_of_memory(q, k, v, keep, pair_bias, gate):
        raise torch.OutOfMemoryError("too large")

    def unknown(q, k, v, keep, pair_bias, gate):
        raise RuntimeError("no such kernel")

    def endless(q, k, v, keep, pair_bias, gate):
        time.sleep(30)

    measured = bench()
    assert measured.measure(PAIR, Variant("a", lambda: out_of_memory)).status == "OOM"
    failed = measured.measure(PAIR, Variant("b", lambda: unknown))
    assert (failed.status, failed.reason) == ("failed", "RuntimeError: no such kernel")
    assert measured.measure(PAIR, VARIANTS["flex"]).status == "missing"
    refused = measured.measure(PAIR, dataclasses.replace(VARIANTS["deepspeed"], missing=variants.available))
    assert (refused.status, refused.reason) == ("refused", "bf16 only")
    measured.limit_s = 0.2
    slow = measured.measure(PAIR, Variant("c", lambda: endless))
    assert (slow.status, slow.reason) == ("timeout", "longer than 0 s")
    measured.end = time.monotonic()
    late = measured.measure(PAIR, Variant("d", lambda: endless))
    assert (late.status, late.reason) == ("skipped", "the 400 s of --total-s were used up")
    assert measured.measure(PAIR, VARIANTS["flex"]).status == "missing"  # the reason that more time would not remove


def test_whole_blocks_are_traced_in_one_graph(monkeypatch):
    """With FlexAttention inside. The compiler behind the trace is torch's and left out here."""
    compiled = torch.compile
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled(module, backend=backend, **options))
    problem = Problem.of(PAIR, CPU)
    with torch.no_grad():
        expected = problem.module(*problem.inputs, *problem.masks)
    for name in ("compile", "ours+compile", "flex+compile"):
        variant = VARIANTS[name]
        with torch.no_grad(), attention_by(variant.make()):
            actual = variant.forward_of(problem.module)(*problem.inputs, *problem.masks)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 3
    assert "flex_attention" in graphs[-1].print_readable(print_output=False)


def test_program(tmp_path, capsys):
    files = {"--json": tmp_path / "new" / "b.json", "--plot": tmp_path / "new" / "b.png"}
    arguments = ["--device", "cpu", "--tiny", "--min-ms", "0.1", "--peers", "ours-gate-apart,eager,deepspeed,flex"]
    assert program.main([*arguments, *(str(word) for pair in files.items() for word in pair)]) == 0
    out = capsys.readouterr().out
    assert "block       fp32   fwd+bwd" in out and "pair-stack  fp32   fwd+bwd" in out
    assert "attention ms" in out and "flex: missing, everywhere: runs on CUDA only" in out
    made = record.read(files["--json"])
    assert made["machine"]["command"].startswith("python -m tests.benchmarks.evoformer_block --device cpu --tiny")
    statuses = {name: {r["status"] for r in by_name.values()} for name, by_name in by_implementation(made).items()}
    timed, missing = ("ours", "ours-gate-apart", "eager"), ("deepspeed", "flex")
    assert statuses == {**dict.fromkeys(timed, {"ok"}), **dict.fromkeys(missing, {"missing"})}
    for result in made["results"]:
        if result["status"] == "ok":
            assert result["attention"]["median"] > 0 and result["first_s"] > 0 and len(result["errors"]) == 4
    assert files["--plot"].stat().st_size > 10_000
    markdown = tables.markdown(made, tables.options_of("columns=ours,eager,flex"))
    assert "| block (fwd+bwd, ms) | ours | eager | flex |" in markdown
    assert "| block (MSA 18 x 24), fp32 |" in markdown and "| pair-stack (24 x 24), fp32 |" in markdown


def by_implementation(made: dict) -> dict[str, dict]:
    return {
        name: {line: results[name] for line, results in table.by_line(made).items()}
        for name in table.implementations(made)
    }


def test_figures_of_a_record():
    case = {"name": "block", "dtype": "bf16"}
    ok = {"case": case, "implementation": "ours", "which": "fwd+bwd", "mode": "eager", "status": "ok", "reason": ""}
    ok.update(timing={"median": 40.0}, attention={"median": 10.0}, first_s=1.25, extra_mib=1234.4)
    oom = {**ok, "implementation": "eager", "status": "OOM", "timing": None, "attention": None, "extra_mib": None}
    lines = report.render_shares({"results": [ok, oom]}).splitlines()
    assert lines[2].split() == ["block", "ours", "40.0", "10.0", "25%", "30.0", "1.2"] and len(lines) == 3
    assert report.render_shares({"results": [oom]}) is None
    assert [report.height(result, "time") for result in (ok, oom)] == [40.0, None]
    assert [report.height(result, "memory") for result in (ok, oom)] == [1234.4, None]


def test_program_fails_when_ours_is_wrong(monkeypatch, capsys):
    monkeypatch.setitem(VARIANTS, "ours", Variant("ours", lambda: without_mask))
    arguments = ["--device", "cpu", "--tiny", "--blocks", "pair-stack", "--min-ms", "0.1", "--peers", "deepspeed"]
    assert program.main(arguments) == 1
    assert "ours: WRONG, everywhere: relative error above" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--peers", "nosuch"], "--peers takes ours-gate-apart, eager, .*or all; got 'nosuch'"),
        (["--tiny", "--peers", "ours"], "--peers takes .*; got 'ours'"),
        (["--tiny", "--blocks", "nosuch"], "--blocks takes block, pair-stack or all; got 'nosuch'"),
        (["--tiny", "--limit-s", "0"], "--limit-s must be above 0, got 0"),
        ([], "--device cpu takes small blocks only, got no --tiny"),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        program.main(["--device", "cpu", *arguments])
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(capsys.readouterr().err)


def test_the_op_is_back_afterwards():
    with pytest.raises(ValueError, match="implementation must be None .* got 'tiled'"), attention_by(variants.eager()):
        block_attention.evoformer_attention(1, 2, 3, mask_bias=None, pair_bias=None, gate=4, implementation="tiled")
    assert block_attention.evoformer_attention is PAIR_OP

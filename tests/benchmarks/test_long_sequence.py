# SPDX-License-Identifier: Apache-2.0
"""The long-sequence benchmarks: rungs, records, and a rehearsal of one rung of each kind on the CPU."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deepspeed_ds4sci.config import DS4SciConfig, check_combinations, read_block
from deepspeed_ds4sci.hooks.checkpoint_offload import CheckpointOffload
from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.sequence.local_attention import unavailable_reason
from deepspeed_ds4sci.training import step_flops
from tests.benchmarks import longest_sequence, throughput_by_length, train_short_infer_long
from tests.benchmarks.long_sequence import launch, models, report, worker
from tests.benchmarks.long_sequence.rungs import ATTENTION, BY_VALUE, RUNGS, chosen_rungs
from tests.benchmarks.throughput_by_length import VARIANTS

CONFIG = GenSLMConfig(16, 2, 2, 32, 64)
OK = dict(batch_size=1, length=64, status="ok", seconds=0.5, device_gib=1.0, host_gib=2.0)
STEPS = dict(timed_step=2, step_seconds=[0.7, 0.5])
OOM = dict(batch_size=1, length=128, status="out of memory")
ABOUT = dict(device="card", cuda="-", driver="-", torch="2", commit="abc", date="2026-01-01", command="c")


@pytest.mark.parametrize("rung", RUNGS.values(), ids=lambda rung: rung.name)
def test_every_rung_is_a_valid_config(rung):
    from deepspeed.runtime.config import DeepSpeedConfig

    for tiny in (False, True):
        config = rung.ds_config(tiny)
        assert json.loads(json.dumps(config)) == config
        assert (read_block(config) is not None) == bool(rung.features)
        assert ("bf16" in config) != tiny
        parsed = DeepSpeedConfig({name: block for name, block in config.items() if name != "ds4sci"})
        offload = parsed.zero_config.offload_optimizer
        assert (offload is not None and offload.device == "cpu") == rung.offload_optimizer


def test_rungs_are_chosen_by_name_ladder_and_number_of_gpus():
    assert sorted(BY_VALUE) == sorted(RUNGS)
    assert {rung.gpus for rung in chosen_rungs("all", 1)} == {1} and len(chosen_rungs("all", 2)) == len(RUNGS)
    assert [rung.name for rung in chosen_rungs("flash,alst-sdpa", 1)][-1] == "alst-sdpa"
    with pytest.raises(ValueError, match="rungs must be of all, mask, flash, alst, .*; got 'fast'"):
        chosen_rungs("fast", 1)
    with pytest.raises(ValueError, match=r"rungs need more than the 1 GPU\(s\) that are there: two-gpus \(2\)"):
        chosen_rungs("two-gpus", 1)


@pytest.mark.parametrize("module", [longest_sequence, throughput_by_length])
def test_attention_is_replaced_where_a_rung_names_a_fast_one(module):
    rungs = ["--rungs", "math,recompute,alst-sdpa"] if module is longest_sequence else ["--variants", "off,on"]
    options = module.parse_arguments(["--tiny", "--attention", "cudnn", *rungs])
    chosen = getattr(options, "rungs", None) or options.variants
    for rung in chosen:
        used = rung.features.get("attention", {}).get("implementation")
        kept = {"math": "math", "alst-sdpa": None}
        assert used == kept.get(rung.name, "cudnn") and ("(cudnn)" in rung.says) == (rung.name not in kept)
        assert rung.features.keys() == (VARIANTS | RUNGS)[rung.name].features.keys()


@pytest.mark.parametrize("implementation", ATTENTION)
@pytest.mark.parametrize("module", [longest_sequence, throughput_by_length])
def test_every_attention_that_is_offered_gives_a_valid_config(module, implementation):
    rungs = ["--rungs", "flash"] if module is longest_sequence else ["--variants", "off"]
    options = module.parse_arguments(["--tiny", "--attention", implementation, *rungs])
    (rung,) = getattr(options, "rungs", None) or options.variants
    for tiny in (False, True):
        config = rung.ds_config(tiny)
        block = read_block(config) or DS4SciConfig()
        check_combinations(block, config)
        runs_here = unavailable_reason(implementation, "cpu") is None
        assert block.attention.implementation == (implementation if runs_here or not tiny else "fastest")


def test_both_models_have_the_size_that_is_compared():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        ours = GenSLM(models.genslm(RUNGS["flash"], 2048, tiny=False))
        theirs = LlamaForCausalLM(LlamaConfig(**models.llama_arguments(tiny=False)))
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (ours, theirs))
    assert ours == pytest.approx(2.5e9, rel=0.03) and theirs == pytest.approx(ours, rel=0.03)
    multiplied = sum(p.numel() for p in LlamaForCausalLM(_tiny_llama()).parameters() if p.dim() == 2)
    multiplied -= 69 * 64  # the embedding is looked up
    length = 64
    causal = 4 * 2 * 2 * (length * length / 2) * 64  # layers x both products x operations x pairs x hidden
    expected = 3 * (2 * multiplied * length + causal)
    assert step_flops(models.llama_as_decoder(tiny=True), length) == pytest.approx(expected)


def _tiny_llama():
    from transformers import LlamaConfig

    return LlamaConfig(**models.llama_arguments(tiny=True))


def test_layers_that_are_not_computed_keep_their_gradients_and_pass_on_a_new_tensor():
    layer = torch.nn.Linear(4, 4)
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    output = worker.stand_in(layer, hidden, None)
    assert torch.equal(output, hidden) and output.data_ptr() != hidden.data_ptr()
    output.sum().backward()
    assert all(p.grad.shape == p.shape and not p.grad.any() for p in layer.parameters())
    with pytest.raises(ValueError, match='--compute-layers needs a rung that recomputes whole layers, got "kee'):
        models.job_of(RUNGS["keep-attention"], [(1, 64)], tiny=True, steps=1, compute_layers=1)
    assert models.counted_config(RUNGS["recompute"], False, 8).num_layers == 8
    for count, computed in ((3, [0, 1, 5]), (1, [0]), (6, list(range(6))), (None, list(range(6)))):
        layers = [torch.nn.Linear(4, 4) for _ in range(6)]
        worker.compute_some(layers, {"compute_layers": count})
        assert [i for i, layer in enumerate(layers) if "forward" not in vars(layer)] == computed


def test_what_layers_that_are_not_computed_start_from_is_kept_until_the_backward_pass():
    offload = CheckpointOffload()
    hidden = torch.randn(1, 64, 64, requires_grad=True)  # four pages
    free = []  # slots, whenever a layer is computed

    def layer(hidden):
        free.append(len(offload.pool._free))
        return worker.stand_in(torch.nn.Linear(4, 4), hidden, None)

    for _ in range(4):
        with offload.of(hidden):
            hidden = checkpoint(layer, hidden, use_reentrant=False)
    assert offload.pool.held_bytes == 4 * hidden.nbytes and free == [0, 0, 0, 0]
    hidden.sum().backward()
    assert free[4:] == [0, 1, 2, 3] and len(offload.pool._free) == 4


def test_rates_are_per_gpu_and_per_second():
    case = report.with_rates(dict(OK, batch_size=4), CONFIG, ranks=2, peak=1e9)
    assert case["tokens_per_second"] == 4 * 64 / 0.5
    assert case["tflops"] == pytest.approx(4 * step_flops(CONFIG, 64) / 0.5 / 2 / 1e12)
    assert case["mfu"] == pytest.approx(case["tflops"] * 1e3) and case["method_tflops"] > case["tflops"]
    assert report.with_rates(OOM, CONFIG, 1, 1e9) == OOM


def ladder_record():
    rung = dict(name="flash", ladder="flash", says="+ flash", gpus=1, computed_layers=8, resolved=True, ds_config={})
    cases = [report.with_rates(OK, CONFIG, 1, 1e12), OOM]
    found = dict(longest=64, failed=128, because="out of memory", cases=cases)
    empty = dict(longest=0, failed=64, because="time", cases=[dict(OOM, length=64, status="time")])
    return {"machine": ABOUT, "rungs": [rung | found, rung | empty | {"ladder": "alst", "computed_layers": None}]}


def test_tables_and_plots(tmp_path):
    pytest.importorskip("matplotlib")
    record = ladder_record()
    text = report.ladder_table(record)
    assert "flash [8 layers computed]" in text and "128        out of memory" in text and "none" in text
    report.draw_ladder(record, tmp_path / "ladder.png")
    cases = record["rungs"][0]["cases"]
    variant = dict(name="on", says="all", gpus=1, cases=cases, batches=cases)
    lengths = {"machine": ABOUT, "variants": [variant]}
    assert throughput_by_length.table(lengths).count("out of memory") == 2
    report.draw_lengths(lengths, tmp_path / "lengths.png")
    lines = [{"name": "alibi", "perplexity": [[32, 60.0], [64, 61.0]]}]
    short = {"machine": ABOUT, "lines": lines, "length": 32, "lengths": [32, 64], "title": "lambda"}
    train_short_infer_long.draw(short, tmp_path / "short.png")
    for name in ("ladder", "lengths", "short"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report.write(tmp_path / "a" / "record.json", record)
    assert json.loads((tmp_path / "a" / "record.json").read_text())["rungs"][0]["longest"] == 64


def test_the_ladder_is_put_together_from_records(tmp_path):
    pytest.importorskip("matplotlib")
    record = ladder_record()
    whole = dict(record["rungs"][0], name="alst-sdpa", ladder="alst", computed_layers=None, failed=None, because=None)
    masked = dict(whole, name="mask-cpu", ladder="mask")
    other = {"machine": ABOUT | {"commit": "def", "date": "2026-01-02"}, "rungs": [whole, masked]}
    lines = report.markdown_ladder([record, other]).splitlines()
    assert lines.pop(2).startswith("| `mask-cpu`: + flash | 1 | 64 | not tried | 1.0 |")  # ladders in their order
    assert lines[2].startswith("| `flash`: + flash | 1 | 64 | 128, out of memory | 1.0 | 2.0 | 8 layers computed |")
    assert lines[3].startswith("| `alst-sdpa`: + flash | 1 | 64 | not tried | 1.0 | 2.0 | 0.5 | 128 |")
    assert lines[4] == "" and "commit abc" in lines[5] and "commit def" in lines[6]
    drawn = report.together([record, other])
    assert [rung["name"] for rung in drawn["rungs"]] == ["mask-cpu", "flash", "alst-sdpa"]  # "none" is no bar
    assert drawn["machine"] | {"command": "c"} == ABOUT | {"commit": "abc, def", "date": "2026-01-01, 2026-01-02"}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, each in zip(files, (record, other), strict=True):
        report.write(file, each)
    plot = tmp_path / "ladder.png"
    assert longest_sequence.main(["--redraw", ",".join(map(str, files)), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("order", (1, -1))
def test_lengths_of_several_records_are_one_line_with_a_cross_where_memory_ends(tmp_path, monkeypatch, order):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    short, long = (report.with_rates(OK | {"length": length}, CONFIG, 1, 1e12) for length in (64, 128))
    variant = dict(name="on", says="all", gpus=1, batches=[])
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, cases in zip(files[::order], ([short, OOM], [long, OOM | {"length": 256}]), strict=True):
        report.write(file, {"machine": ABOUT, "variants": [variant | {"cases": cases}]})
    drawn = []
    monkeypatch.setattr(report, "_save", lambda figure, *_: drawn.append(figure.axes[0].lines))
    arguments = ["--redraw", ",".join(map(str, files)), "--plot", str(tmp_path / "lengths.png")]
    assert throughput_by_length.main(arguments) == 0
    line, cross, explained = drawn[0]
    assert list(line.get_xdata()) == [64, 128] and list(line.get_ydata()) == [short["tflops"], long["tflops"]]
    assert list(cross.get_xdata()) == [256] and list(cross.get_ydata()) == [long["tflops"]]  # 128 trained after all
    assert explained.get_label() == "out of memory"
    pyplot.close("all")


@pytest.mark.parametrize("module", [longest_sequence, throughput_by_length])
def test_redrawing_needs_to_know_where_to(module, capsys):
    with pytest.raises(SystemExit):
        module.parse_arguments(["--redraw", "a.json"])
    assert "--redraw needs --plot" in capsys.readouterr().err


def test_the_ladder_says_which_rungs_ran_on_another_card_and_takes_the_last_record_of_a_rung(tmp_path):
    record = ladder_record()
    again = dict(record["rungs"][0], longest=64, failed=96)
    other = {"machine": ABOUT | {"device": "NVIDIA H200 NVL"}, "rungs": [dict(again, name="tiling"), again]}
    lines = report.markdown_ladder([record, other]).splitlines()[2:]
    assert lines[0].startswith("| `flash`: + flash, on H200 NVL | 1 | 64 | 96, ") and lines[2] == ""
    assert lines[1].startswith("| `tiling`: + flash, on H200 NVL | 1 | 64 | 96, ")
    assert "| `tiling`: + flash, 8 layers computed, on H200 NVL | 64 |" in report.markdown_lengths([record, other])
    assert " on " not in report.markdown_ladder([other, other]).split("\n\n")[0]
    both = report.together([record, other])
    assert report._drawn_name(both["rungs"][0]) == "flash [8 layers, H200 NVL]"


def test_runs_of_one_commit_and_config_are_one_rung_of_the_ladder():
    rung = ladder_record()["rungs"][0]
    good = dict(OK, device_gib=3.0) | STEPS
    runs = [
        dict(longest=0, failed=160, cases=[dict(OOM, length=160)]),
        dict(longest=96, failed=None, because=None, cases=[dict(good, length=96), dict(OOM, length=32)]),
        dict(longest=64, failed=None, because=None, cases=[dict(good, length=64)]),
    ]
    records = [{"machine": ABOUT, "rungs": [rung | run]} for run in runs]
    for each in records:
        each["rungs"][0]["cases"] = [report.with_rates(case, CONFIG, 1, 1e12) for case in each["rungs"][0]["cases"]]
    (line,) = report.markdown_ladder(records).split("\n\n")[0].splitlines()[2:]
    assert line.startswith("| `flash`: + flash | 1 | 96 | 160, out of memory | 3.0 |")
    (drawn,) = report.together(records)["rungs"]
    assert [case["length"] for case in drawn["cases"]] == [32, 64, 96, 160]
    again = {"machine": ABOUT, "rungs": [rung | dict(longest=0, failed=96, cases=[dict(OOM, length=96)])]}
    for order in ([records[1], again], [again, records[1]]):  # a length that trained stays good
        (line,) = report.markdown_ladder(order).split("\n\n")[0].splitlines()[2:]
        assert "| 96 | not tried |" in line
    for what, value in (("computed_layers", 4), ("says", "else"), ("ds_config", {"a": 1}), ("commit", "def")):
        machine = ABOUT | ({what: value} if what in ABOUT else {})
        other = {"machine": machine, "rungs": [records[2]["rungs"][0] | {what: value}]}
        (line,) = report.markdown_ladder([records[1], other]).split("\n\n")[0].splitlines()[2:]
        assert "| 64 | not tried |" in line


def test_the_end_of_a_budget_says_nothing_about_a_length(monkeypatch):
    cut_off = dict(event="case", batch_size=1, length=128, status="time")
    monkeypatch.setattr(throughput_by_length, "run_cases", lambda *_, **__: [OK | STEPS | {"event": "case"}, cut_off])
    options = throughput_by_length.parse_arguments(["--tiny", "--variants", "on"])

    def statuses(seconds):
        monkeypatch.setattr(throughput_by_length.time, "monotonic", iter([0.0, seconds]).__next__)
        found = throughput_by_length.measure(options.variants[0], [(1, 64), (1, 128)], options, 10.0, 1e12)
        return [case["status"] for case in found]

    assert statuses(9.0) == ["ok", "time"] and statuses(11.0) == ["ok"]


def test_a_table_says_where_the_first_step_was_timed():
    later = report.with_rates(OK | STEPS, CONFIG, 1, 1e12)
    first = later | dict(timed_step=1, step_seconds=[0.5])
    assert [report.cells(case)[2] for case in (later, first)] == ["0.5", "0.5 (first)"]
    older = json.loads((Path(worker.__file__).parents[1] / "results/long_sequence/h100-steps_65536.json").read_text())
    lines = report.ladder_table(older).splitlines()
    assert ["(first)" in line for line in lines[-3:]] == [False, True, False]


def test_steps_are_repeated_while_they_are_short_and_time_is_left(monkeypatch):
    seconds = iter([0.5, 0.2, 0.1, 0.4, 0.4])  # of one step each
    now = [0.0]

    def train_step(*_):
        now[0] += next(seconds)
        return 4.0

    monkeypatch.setattr(worker, "train_step", train_step)
    monkeypatch.setattr(worker.dist, "broadcast", lambda *_: None)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    cpu = torch.device("cpu")
    began = time.monotonic()
    limits = ((0.6, 9), (0.3, 9), (0.6, 0.3))
    jobs = [dict(steps=3, repeat_under=short, until=began + left) for short, left in limits]
    found = [worker.measure(None, job, 1, 64, cpu) for job in jobs]
    assert [case["timed_step"] for case in found] == [3, 1, 1]
    assert [len(case["step_seconds"]) for case in found] == [3, 1, 1]
    assert [round(case["seconds"], 9) for case in found] == [0.1, 0.4, 0.4]


def test_the_optimizer_has_its_states_before_a_length_is_tried(monkeypatch):
    shapes = []

    def train_step(engine, job, shape, step, device):
        shapes.append(shape)
        if engine == "too big":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(worker, "train_step", train_step)
    monkeypatch.setattr(worker, "another_fits", lambda *_: True)
    monkeypatch.setattr(worker.os, "_exit", lambda code: shapes.append(code))
    job = {"steps": 3, "cases": [(4, 2048), (1, 4096)]}
    worker.make_states("engine", job, torch.device("cpu"))
    assert shapes == [(1, 256)]
    worker.make_states("too big", job | {"cases": [(1, 64)]}, torch.device("cpu"))
    assert shapes[1:] == [(1, 64), worker.OUT_OF_MEMORY]


@pytest.mark.parametrize("module, limit", [(longest_sequence, 300), (throughput_by_length, 200)])
def test_all_steps_that_are_repeated_fit_into_a_case(module, limit):
    options = module.parse_arguments(["--tiny"])
    assert options.steps * options.repeat_under < limit
    assert module.parse_arguments(["--tiny", "--repeat-under", "20"]).repeat_under == 20


@pytest.mark.parametrize(
    "module, arguments, message",
    [
        (longest_sequence, ["--tiny", "--rungs", "no"], "got 'no'"),
        (
            longest_sequence,
            ["--tiny", "--rungs", "alst-sdpa", "--compute-layers", "2"],
            '--compute-layers needs a rung that recomputes whole layers, got "alst-sdpa"',
        ),
        (
            longest_sequence,
            ["--tiny", "--rungs", "keep-attention", "--attention", "flex"],
            'does not go with ds4sci.attention.implementation = "flex"',
        ),
        (throughput_by_length, ["--tiny", "--variants", "no"], "--variants must be of off, keep"),
        (throughput_by_length, ["--tiny", "--variants", "keep", "--attention", "math"], "does not go with"),
        (train_short_infer_long, [], "are required: --genome"),
        (
            train_short_infer_long,
            ["--genome", "x", "--lengths", "64,96"],
            "--lengths must divide the longest one = 96",
        ),
    ],
)
def test_wrong_options_are_named(capsys, module, arguments, message):
    with pytest.raises(SystemExit):
        module.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_held_out_tokens_are_whole_windows_at_the_end():
    tokens = np.arange(100)
    train, held_out = train_short_infer_long.split(tokens, 0.3, 8)
    assert len(held_out) == 24 and np.array_equal(np.concatenate([train, held_out]), tokens)
    with pytest.raises(ValueError, match="30% of 100 tokens must be at least the longest length = 32, got 30"):
        train_short_infer_long.split(tokens, 0.3, 32)


def test_perplexity_and_scaled_positions():
    config = GenSLMConfig(16, 1, 2, 16, 32, rotary_fraction=1.0)
    model = GenSLM(config)
    model.head.weight.data.zero_()  # every token is as likely as any other
    tokens = np.random.default_rng(0).integers(0, 69, 128).astype(np.uint8)
    for kind in ("none", "yarn"):
        other = train_short_infer_long.scaled(model, kind, 4.0, 32)
        assert train_short_infer_long.perplexity(other, tokens, 64, "cpu") == pytest.approx(69)
        assert other.head.weight is model.head.weight or torch.equal(other.head.weight, model.head.weight)
    plain, yarn = (train_short_infer_long.scaled(model, kind, 4.0, 32) for kind in ("none", "yarn"))
    positions = torch.arange(40)[None]
    assert not torch.allclose(plain.rotary(positions, torch.float32)[0], yarn.rotary(positions, torch.float32)[0])


@pytest.mark.slow
@pytest.mark.distributed(1)
def test_rungs_train_in_processes_of_their_own():
    def trained(name):
        job = models.job_of(RUNGS[name], [(1, 64), (2, 96)], tiny=True, steps=2, compute_layers=None)
        return launch.run_cases(job, ranks=1, seconds=240, tiny=True)

    def climbed(name):
        climb = dict(start=64, multiple=32, limit=128, precision=1.1, failed=None, peaks=[])
        job = models.job_of(RUNGS[name], [], tiny=True, steps=1, compute_layers=1, climb=climb)
        return launch.run_cases(job, ranks=1, seconds=240, tiny=True)

    with ThreadPoolExecutor() as pool:  # each is little more than the start of a process
        searched = [pool.submit(climbed, name) for name in ("recompute", "alst-host-checkpoints")]
        results = list(pool.map(trained, ("mask-baseline", "alst-host-optimizer")))
    for search in searched:
        assert [(case["status"], case["length"]) for case in search.result()] == [("ok", 64), ("ok", 96), ("ok", 128)]
    for found in results:
        done = [(case["status"], case["batch_size"], case["length"]) for case in found]
        assert done == [("ok", 1, 64), ("ok", 2, 96)], found
        assert all(case["timed_step"] == 2 and case["seconds"] == case["step_seconds"][1] > 0 for case in found)
        assert all(3 < case["loss"] < 6 and case["host_gib"] > 0.1 for case in found)

# SPDX-License-Identifier: Apache-2.0
"""What the examples share: log, schedule, resuming, seeds."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepspeed_ds4sci.training import RunLog, count_parameters, load_config, read_log, resume, running_mean, seed_step

CPU_CONFIG = Path(__file__).resolve().parents[3] / "configs" / "evoformer_cpu_zero2_offload.json"


def test_log_of_a_resumed_run_continues_at_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": 1.0 / step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a crash
    assert [r["step"] for r in read_log(path)] == [1, 2, 3]
    RunLog(path, resumed_step=2).append({"step": 3, "loss": 9.0})
    assert [r["loss"] for r in read_log(path)] == [1.0, 0.5, 9.0]
    RunLog(path)
    assert read_log(path) == []


def test_running_mean():
    assert running_mean([2.0, 4.0, 9.0], 2) == [2.0, 3.0, 6.5]


def test_the_schedule_follows_the_number_of_steps():
    parameters = load_config(CPU_CONFIG, 20)["scheduler"]["params"]
    assert parameters["total_num_steps"] == 20 and parameters["warmup_num_steps"] == 5
    assert load_config(CPU_CONFIG, 5000)["scheduler"]["params"]["warmup_num_steps"] == 40


def test_tensorboard_files_go_where_the_run_goes(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"tensorboard": {"enabled": true}}')
    assert load_config(path, 1, tmp_path)["tensorboard"]["output_path"] == str(tmp_path)
    path.write_text('{"tensorboard": {"enabled": true, "output_path": "elsewhere"}}')
    assert load_config(path, 1, tmp_path)["tensorboard"]["output_path"] == "elsewhere"
    path.write_text("{}")
    assert load_config(path, 1, tmp_path) == {}


@pytest.mark.parametrize(
    "loaded, message",
    [
        ((None, None), "--resume needs a checkpoint, got none in out/checkpoints"),
        (("p", {"step": 3, "run": {"seed": 1}}), "the checkpoint has seed = 1, got 0; n_seq = None, got 8"),
    ],
)
def test_resume_refuses_another_run(loaded, message):
    engine = SimpleNamespace(load_checkpoint=lambda folder: loaded)
    with pytest.raises(ValueError, match=message):
        resume(engine, Path("out"), {"seed": 0, "n_seq": 8})


def test_resume_returns_what_was_saved():
    state = {"step": 3, "run": {"seed": 0}}
    assert resume(SimpleNamespace(load_checkpoint=lambda folder: ("p", state)), Path("out"), {"seed": 0}) is state


def test_seeds_depend_on_step_and_rank():
    drawn = set()
    for step, rank in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_step(7, step, rank)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 3


def test_parameters_that_are_partitioned_count_whole():
    model = torch.nn.Linear(3, 4)
    model.weight.ds_numel = 100
    assert count_parameters(model) == 104

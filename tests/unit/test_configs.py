# SPDX-License-Identifier: Apache-2.0
"""Every DeepSpeed config in `configs/` parses with DeepSpeed's own class and says what its table says."""

import copy
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(ROOT.glob("configs/*.json"))


def load(path):
    return json.loads(path.read_text())


def parse(config):
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig(copy.deepcopy(config))


def test_there_are_configs():
    assert {path.name for path in CONFIGS} >= {"evoformer_bf16_zero2.json", "evoformer_cpu_zero2_offload.json"}


def test_configs_lie_in_one_folder():
    # Below `runs/` lie the outputs of examples that were run here.
    stray = [path for path in (ROOT / "examples").rglob("*.json") if "runs" not in path.parts]
    assert not stray, f"move to configs/, where they are tested: {stray}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_parses(path):
    parsed = parse(load(path))
    assert parsed.train_micro_batch_size_per_gpu >= 1
    assert parsed.optimizer_name == "adamw"
    if path.name.startswith("evoformer"):
        assert parsed.scheduler_name == "WarmupCosineLR"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_misspelt_field_fails(path):
    config = load(path)
    config["zero_optimization"]["stages"] = 2
    with pytest.raises(ValueError, match="stages"):
        parse(config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_no_value_is_auto_and_no_key_is_unknown(path):
    # DeepSpeed drops "auto" values and accepts unknown top-level keys without a word.
    config = load(path)
    assert '"auto"' not in path.read_text()
    known = {
        "ds4sci",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "steps_per_print",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
        "optimizer",
        "scheduler",
        "bf16",
        "tensorboard",
    }
    assert set(config) <= known


def test_the_gpu_config_is_bf16_zero2():
    parsed = parse(load(ROOT / "configs/evoformer_bf16_zero2.json"))
    assert parsed.bfloat16_config.enabled and parsed.zero_optimization_stage == 2
    assert parsed.zero_config.offload_optimizer is None


def test_the_cpu_config_offloads_and_builds_no_op():
    config = load(ROOT / "configs/evoformer_cpu_zero2_offload.json")
    parsed = parse(config)
    assert parsed.zero_optimization_stage == 2 and parsed.zero_config.offload_optimizer.device == "cpu"
    assert not parsed.bfloat16_config.enabled and not parsed.float16_config.enabled
    # CPUAdam and FusedAdam would be compiled at first use.
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["optimizer"]["params"]["torch_adam"] is True


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_table_lists_the_config(path):
    assert f"`{path.name}`" in (ROOT / "configs/README.md").read_text()

# SPDX-License-Identifier: Apache-2.0
"""The GenSLM family: each config is valid as a whole, and its model exists and fits the machine that it is for."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from deepspeed_ds4sci.config import check_combinations, read_block
from deepspeed_ds4sci.models import NAMED_CONFIGS, GenSLM, GenSLMConfig

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30

# File -> models that it is for, GPUs, GiB of memory of each.
FAMILY = {
    "genslm_25M_bf16_zero1.json": (("gpt-neox-25M", "gpt-neox-25M-10k", "gpt2-25M"), 1, 16),
    "genslm_250M_bf16_zero1.json": (("gpt-neox-250M", "gpt-neox-250M-10k", "gpt2-256M"), 1, 24),
    "genslm_2.5B_bf16_zero1_one_gpu.json": (("gpt-neox-2.5B", "gpt2-2.5B"), 1, 80),
    "genslm_2.5B_bf16_zero3_8_gpus_long.json": (("gpt-neox-2.5B",), 8, 40),
    "genslm_25B_bf16_zero3_16_gpus_long.json": (("gpt-neox-25B",), 16, 80),
    "genslm_25B_bf16_zero3_offload_8_gpus.json": (("gpt-neox-25B", "gpt2-25B"), 8, 80),
    "genslm_33B_bf16_zero3_offload_8_gpus.json": (("gpt-neox-33B",), 8, 80),
}
PAIRS = [(name, model) for name, (models, _, _) in FAMILY.items() for model in models]


def load(name):
    return json.loads((ROOT / "configs" / name).read_text())


@lru_cache
def parameters_of(model):
    """Of a model of this name, built without memory."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GenSLM(model).parameters())


def test_every_genslm_config_is_here():
    found = {path.name for path in (ROOT / "configs").glob("genslm_*.json")}
    assert found == {*FAMILY, "genslm_cpu_zero2_sequence_parallel.json"}


@pytest.mark.parametrize("name", FAMILY)
def test_its_block_is_valid_and_divides_the_gpus(name):
    config = load(name)
    block = read_block(config)
    _, gpus, _ = FAMILY[name]
    if block is None:
        return
    check_combinations(block, config)
    assert gpus % block.sequence_parallel.size == 0


@pytest.mark.parametrize("name, model", PAIRS)
def test_its_model_is_built_on_the_meta_device_and_its_heads_divide(name, model):
    config = GenSLMConfig.named(model)
    claimed = float(model.split("-")[-1 if model[-1] in "MB" else -2].rstrip("MB")) * (1e9 if "B" in model else 1e6)
    assert parameters_of(model) == pytest.approx(claimed, rel=0.06)
    block = read_block(load(name))
    if block is not None:
        mode = block.sequence_parallel.layout_mode()
        by_heads = block.sequence_parallel.size if mode == "ulysses" else mode["ulysses"]
        assert config.num_heads % by_heads == 0


@pytest.mark.parametrize("name, model", PAIRS)
def test_weights_gradients_and_states_fit_the_gpu_that_it_names(name, model):
    """16 bytes per parameter, of which ZeRO and offload leave their share on each GPU; the rest is for activations."""
    config, (_, gpus, gib) = load(name), FAMILY[name]
    zero = config["zero_optimization"]
    states = 0 if "offload_optimizer" in zero else 12
    weights_and_gradients = 4 / gpus if zero["stage"] == 3 else 4
    assert parameters_of(model) * (weights_and_gradients + states / gpus) < 0.7 * gib * GIB


def test_the_published_sizes_all_have_a_config():
    classes = {"25M", "250M", "256M", "2.5B", "25B", "33B"}
    wanted = {name for name in NAMED_CONFIGS if any(part in classes for part in name.split("-"))}
    assert wanted == {model for _, model in PAIRS}

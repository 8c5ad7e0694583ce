# SPDX-License-Identifier: Apache-2.0
"""Published sizes and refused configurations."""

import pytest
import torch

from deepspeed_ds4sci.models import NAMED_CONFIGS, GenSLM, GenSLMConfig

TINY = dict(hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24, max_positions=32, rotary_fraction=0.5)


def counted(config: GenSLMConfig) -> int:
    """Parameters by hand."""
    h, ffn, layers = config.hidden_size, config.intermediate_size, config.num_layers
    attention = (h * 3 * h + 3 * h) + (h * h + h)
    mlp = (h * ffn + ffn) + (ffn * h + h)
    positions = config.max_positions * h if config.position_embedding == "learned" else 0
    tokens = config.vocab_size * h * (1 if config.tie_embeddings else 2)
    return layers * (attention + mlp + 4 * h) + 2 * h + tokens + positions


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_published_sizes_exist_on_the_meta_device(name):
    with torch.device("meta"):
        model = GenSLM(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == counted(model.config)
    number, unit = name.removesuffix("-10k").split("-")[-1][:-1], name.removesuffix("-10k")[-1]
    named = float(number) * {"M": 1e6, "B": 1e9}[unit]
    assert abs(parameters / named - 1) < 0.05
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "head_dim", "rotary_dim"),
    [("gpt-neox-250M", 115, 28), ("gpt-neox-15B", 110, 26), ("gpt-neox-2.5B", 120, 30), ("gpt2-2.5B", 82, None)],
)
def test_head_dims(name, head_dim, rotary_dim):
    config = GenSLMConfig.named(name)
    assert config.head_dim == head_dim
    assert rotary_dim is None or config.rotary_dim == rotary_dim


def test_fields_can_be_changed_by_name():
    config = GenSLMConfig.named("gpt2-25M", max_positions=77, position_embedding="alibi")
    assert (config.max_positions, config.position_embedding, config.hidden_size) == (77, "alibi", 512)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GenSLMConfig.named("gpt-5"), "name must be one of gpt-neox-25M, .* got 'gpt-5'"),
        (lambda: GenSLMConfig.named("gpt2-25M", heads=3), "has no field heads"),
        (lambda: GenSLMConfig(**{**TINY, "num_heads": 3}), "hidden_size must be a multiple of num_heads = 3, got 16"),
        (lambda: GenSLMConfig(**TINY, num_kv_heads=3), "num_heads must be a multiple of num_kv_heads = 3, got 4"),
        (lambda: GenSLMConfig(**{**TINY, "num_layers": 0}), "num_layers must be at least 1, got 0"),
        (lambda: GenSLMConfig(**TINY, position_embedding="none"), "position_embedding must be .* got 'none'"),
        (lambda: GenSLMConfig(**TINY, activation="relu"), "activation must be .* got 'relu'"),
        (lambda: GenSLMConfig(**{**TINY, "rotary_fraction": 0.4}), "leave at least 2 of 4 channels, got 0.4"),
        (lambda: GenSLMConfig(**TINY, hidden_dropout=1.0), r"hidden_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_errors_name_the_field(call, message):
    with pytest.raises(ValueError, match=message):
        call()

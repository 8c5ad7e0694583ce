# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_genslm_zero_init.py run: the decoder made in parts by ZeRO-3, and the same made whole."""

import torch
from torch import nn

from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.training import prepare_cpu

CONFIG = GenSLMConfig(16, 2, 4, 32, 64, vocab_size=33, rotary_fraction=0.5)
DS_CONFIG = {
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "steps_per_print": 10**6,
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "ds4sci": {"sequence_parallel": {"size": 2}},
}


def train(model):
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=DS_CONFIG)
    tokens = torch.arange(24)[None] % 33
    losses = []
    for _ in range(3):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def both():
    """(largest difference of a weight, smallest standard deviation of a matrix, losses whole, losses in parts)."""
    import deepspeed

    prepare_cpu()
    torch.manual_seed(3)
    whole = GenSLM(CONFIG)
    torch.manual_seed(3)
    with deepspeed.zero.Init(config_dict_or_path=DS_CONFIG):
        parts = GenSLM(CONFIG)
    held = sum(parameter.ds_tensor.numel() for parameter in parts.parameters())
    differences, deviations = [], []
    for (name, expected), parameter in zip(whole.named_parameters(), parts.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([parameter]):
            assert parameter.shape == expected.shape, name
            differences.append((parameter - expected).abs().max().item())
            if parameter.dim() == 2:
                deviations.append(parameter.std().item())
    return max(differences), min(deviations), held / count(whole), train(whole), train(parts)


def count(model: nn.Module):
    return sum(parameter.numel() for parameter in model.parameters())

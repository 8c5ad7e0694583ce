# SPDX-License-Identifier: Apache-2.0
"""The settings of the engine's optimizer that the sharded position table's takes over."""

from types import SimpleNamespace

import pytest
import torch

from deepspeed_ds4sci.hooks.table_optimizer import TableOptimizer


def of(optimizer, monkeypatch):
    """A table's optimizer beside `optimizer`, without ranks and without DeepSpeed's step."""
    monkeypatch.setattr(TableOptimizer, "_join_norm", lambda self: None)
    engine = SimpleNamespace(basic_optimizer=optimizer, _take_model_step=None)
    return TableOptimizer(engine, torch.nn.Linear(2, 2), None, 0).optimizer


@pytest.mark.parametrize(
    "kind, settings",
    [
        (torch.optim.SGD, dict(lr=0.1, momentum=0.5, dampening=0.2, weight_decay=0.3, maximize=True)),
        (torch.optim.Adam, dict(lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1, decoupled_weight_decay=True)),
        (torch.optim.AdamW, dict(lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.1, amsgrad=True)),
    ],
)
def test_takes_over_every_setting_that_changes_the_update(kind, settings, monkeypatch):
    optimizer = of(kind([torch.nn.Parameter(torch.ones(2))], **settings), monkeypatch)
    assert type(optimizer) is kind
    assert {name: optimizer.param_groups[0][name] for name in settings} == settings


def test_refuses_to_leave_out_bias_correction(monkeypatch):
    class FusedAdam:  # DeepSpeed's needs a compiler
        param_groups = [dict(params=[], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, bias_correction=False)]

    with pytest.raises(NotImplementedError, match="trained with bias correction; leave bias_correction = false out"):
        of(FusedAdam(), monkeypatch)

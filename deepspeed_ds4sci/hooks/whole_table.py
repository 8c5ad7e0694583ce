# SPDX-License-Identifier: Apache-2.0
"""State dicts of an engine whose position table is sharded: with the whole table, in CPU memory of rank 0 only."""

import contextlib
import functools
from pathlib import Path

import torch
import torch.distributed as dist

# DeepSpeed copies its scripts into the checkpoint, where no hook reaches them; they would leave the table out.
_RECOVERY_SCRIPT = """#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
\"\"\"python zero_to_fp32.py DIR OUT [--tag TAG]: one fp32 state dict of a checkpoint in DIR, with the table.\"\"\"
import sys

from deepspeed_ds4sci.checkpoint.__main__ import main

sys.exit(main(["export", *sys.argv[1:]]))
"""


def assembled(table, groups) -> torch.Tensor | None:
    """The whole table [N, D] in CPU memory of rank 0; None on the others. All ranks must call it.

    Rank 0 receives one shard at a time, so no device holds more than its own and one more.
    """
    if groups.dp_rank != 0:
        return None  # replicas
    weight = table.weight.detach().contiguous()
    if table.rank != 0:
        dist.send(weight, dist.get_global_rank(groups.sp_group, 0), group=groups.sp_group)
        return None
    whole = torch.empty(table.num_positions, table.dim, dtype=weight.dtype)
    whole[table.start : table.stop].copy_(weight[: table.stop - table.start])
    received = torch.empty_like(weight)
    for rank in range(1, table.size):
        dist.recv(received, dist.get_global_rank(groups.sp_group, rank), group=groups.sp_group)
        start = rank * table.rows_per_rank
        rows = whole[start : start + table.rows_per_rank]
        rows.copy_(received[: len(rows)])
    return whole


def whole_state_dict(engine) -> dict[str, torch.Tensor]:
    """The state dict of the model that the script built, on rank 0 in CPU memory; empty on the others.

    All ranks must call it. Dtypes are the model's. For `save_pretrained(state_dict=...)`, or any save of one's own.
    """
    table = _table_of(engine)
    with _in_state_dict(table, _exported(engine, table)):
        if engine.zero_optimization_partition_weights():
            state = engine._zero3_consolidated_16bit_state_dict()
        else:
            state = engine.module_state_dict()
    if dist.get_rank() != 0:
        return {}
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def guard_state_dicts(engine, table) -> None:
    """Makes the model's state_dict() refuse, DeepSpeed's checkpoints do without, and exports of the model whole."""
    save_checkpoint, save_16bit = engine._save_checkpoint, engine.save_16bit_model

    def _save_checkpoint(*args, **kwargs):
        with _in_state_dict(table, None):  # the shards have files of their own
            return save_checkpoint(*args, **kwargs)

    def save_16bit_model(*args, **kwargs):
        with _in_state_dict(table, _exported(engine, table)):
            return save_16bit(*args, **kwargs)

    copy_script = engine._copy_recovery_script

    def _copy_recovery_script(folder):
        copy_script(folder)
        (Path(folder) / "zero_to_fp32.py").write_text(_RECOVERY_SCRIPT)
        (Path(folder) / "zero_to_torch.py").unlink()

    consolidated = engine._zero3_consolidated_16bit_state_dict

    def _zero3_consolidated_16bit_state_dict(*args, **kwargs):
        """DeepSpeed walks through the parameters here, of which the table is none."""
        state = consolidated(*args, **kwargs)
        if isinstance(table.in_state_dict, torch.Tensor):
            state[f"{table.name}.weight"] = table.in_state_dict
        return state

    engine._save_checkpoint = functools.wraps(save_checkpoint)(_save_checkpoint)
    engine.save_16bit_model = functools.wraps(save_16bit)(save_16bit_model)
    engine._copy_recovery_script = _copy_recovery_script
    engine._zero3_consolidated_16bit_state_dict = _zero3_consolidated_16bit_state_dict
    table.in_state_dict = True


def _table_of(engine):
    optimizer = getattr(engine, "ds4sci_table_optimizer", None)
    return None if optimizer is None else optimizer.table


def _exported(engine, table):
    if table is None:
        return None
    whole = assembled(table, engine.ds4sci_table_optimizer.groups)
    return None if whole is None else whole.to(table.output_dtype)


@contextlib.contextmanager
def _in_state_dict(table, content):
    if table is None:
        yield
        return
    before, table.in_state_dict = table.in_state_dict, content
    try:
        yield
    finally:
        table.in_state_dict = before

# SPDX-License-Identifier: Apache-2.0
"""The hook of `ds4sci.position_embedding`: a learned table, of which each rank of a sequence group holds its rows, or
positions in place of the model's own."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from deepspeed_ds4sci.hooks.client_parameters import take_out
from deepspeed_ds4sci.hooks.context import Change
from deepspeed_ds4sci.hooks.families import family_of
from deepspeed_ds4sci.hooks.relative_positions import replace_positions
from deepspeed_ds4sci.hooks.removal import mark_as_final
from deepspeed_ds4sci.hooks.table_checkpoint import TableCheckpoint
from deepspeed_ds4sci.hooks.table_optimizer import TableOptimizer
from deepspeed_ds4sci.hooks.whole_table import guard_state_dicts
from deepspeed_ds4sci.sequence.loss import scale_gradient
from deepspeed_ds4sci.sequence.position_table import ShardedPositionEmbedding


class EngineTable(ShardedPositionEmbedding):
    """A sharded table whose weight DeepSpeed does not see.

    To DeepSpeed every parameter is a replica: it would overwrite all shards with rank 0's at start, add up gradients
    of different rows, and save one shard. So the weight is no registered parameter; `TableOptimizer` reduces, clips
    and updates it, and `TableCheckpoint` saves it. It is fp32, and the rows it returns have the dtype of the model.
    The gradient of a rank's rows is the mean over the ranks of its sequence group, as other parameters' is.
    """

    output_dtype: torch.dtype = torch.float32
    name = ""
    """In the model."""

    in_state_dict: torch.Tensor | bool | None = None
    """What state_dict() of the model has of the table: this tensor; nothing (None); or True: it is refused."""

    def __deepcopy__(self, memo):
        raise NotImplementedError(
            f"a model whose position table is sharded cannot be copied: {self.name} is no parameter of it, so an "
            "optimizer or a running average of the copy's parameters would leave it out; build another model"
        )

    def hide(self):
        weight = self._parameters.pop("weight")
        object.__setattr__(self, "weight", weight)

    def forward(self, position_ids):
        rows = scale_gradient(super().forward(position_ids), 1 / self.size)
        return rows.to(self.output_dtype)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.in_state_dict is True:
            raise RuntimeError(
                f"state_dict() of the model would lack {self.name}, of which each rank holds a part, and so would "
                "save_pretrained(): take deepspeed_ds4sci.checkpoint.whole_state_dict(engine) on all ranks and pass "
                "it on, or call engine.save_16bit_model"
            )
        if self.in_state_dict is not None:
            destination[prefix + "weight"] = self.in_state_dict

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """A whole table, from a checkpoint of an unsharded model, is taken; its absence is no error."""
        if prefix + "weight" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


@dataclass
class _Replaced:
    """A table, and the parameter group that its weight was in."""

    table: EngineTable
    group_index: int


class PositionEmbeddingHook:
    name = "position_embedding"

    def before_engine(self, model, context):
        if not context.config.position_embedding.sharded:
            return replace_positions(model, context)
        name, embedding = _learned_table(model)
        weight = embedding.weight
        _broadcast_rows(weight.data, context.groups)
        table = EngineTable.from_table(weight.data.float(), context.groups.sp_group)
        table.hide()
        table.name = name
        table.output_dtype = context.model_dtype or weight.dtype
        table.weight.requires_grad_(weight.requires_grad)
        group_index = take_out(weight, context)
        parent, _, attribute = name.rpartition(".")
        mark_as_final(model, f"{name} was split over the ranks")
        setattr(model.get_submodule(parent), attribute, table)
        context.extras[self.name] = _Replaced(table, group_index)
        rows, dim = table.rows_per_rank, table.dim
        return Change(
            1,
            f"{name} [{table.num_positions}, {dim}] is held as [{rows}, {dim}] on each of {table.size} ranks, its "
            "gradient and optimizer state too",
        )

    def after_engine(self, engine, context):
        replaced = context.extras.get(self.name)
        if replaced is None:
            return
        replaced.table.weight.data = replaced.table.weight.data.to(engine.device)
        optimizer = TableOptimizer(engine, replaced.table, context.groups, replaced.group_index)
        engine.ds4sci_table_optimizer = optimizer
        engine.ds4sci_checkpoint.parts.append(TableCheckpoint(replaced.table.name, replaced.table, optimizer))
        guard_state_dicts(engine, replaced.table)


def _learned_table(model) -> tuple[str, nn.Embedding]:
    """The dotted name and module of a model's learned position table.

    Raises:
        NotImplementedError: it has none, or not one that can be taken apart.
    """
    family = family_of(model)
    embedding = family.learned_table(model)
    if embedding is None:
        raise NotImplementedError(
            f"ds4sci.position_embedding.kind = learned needs a model with a learned position table; "
            f"{type(model).__name__} has none"
        )
    name = next(name for name, module in model.named_modules() if module is embedding)
    if hasattr(embedding.weight, "ds_id"):
        raise NotImplementedError(
            f"{name} was built under deepspeed.zero.Init, which has partitioned it; build the model outside of it to "
            "shard its position table"
        )
    return name, embedding


def _broadcast_rows(weight, groups):
    """Rank 0's values on all ranks, as DeepSpeed does for what it sees; no more than a shard at a time on a device."""
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().current_device_name() if weight.device.type == "cpu" else weight.device
    for rows in weight.chunk(groups.sp_size):
        moved = rows.to(device).contiguous()
        dist.broadcast(moved, 0)
        rows.copy_(moved)

# SPDX-License-Identifier: Apache-2.0
"""Wrong versions of the package, to show that the judge of test_engine_training.py notices them."""

import dataclasses

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_ds4sci.hooks.host_memory import HostPool
from deepspeed_ds4sci.sequence.loss import scale_gradient, sharded_cross_entropy
from tests.distributed.behaviour_worker import engine_of
from tests.distributed.engine_worker import Case, gathered_table, run_case


def wrong_scale(engine):
    """Trap 6: the loss as for a mean over data-parallel ranks."""
    state = engine.ds4sci_sequence
    state.groups = dataclasses.replace(state.groups, sp_size=1)


def deepspeeds_own_divisor(engine):
    """Trap 6: the mean that DeepSpeed takes at stages 0 to 2 if it is left alone."""
    (engine.optimizer if engine.zero_optimization() else engine).sequence_parallel_size = 2


def loss_of_this_rank_alone(engine):
    """Traps 6 and 8: the mean over a rank's own tokens."""
    state = engine.ds4sci_sequence
    state.loss = lambda logits, training: sharded_cross_entropy(
        logits, state.batch.labels, state.groups.own_group, state.divisor
    )


def wrong_group(engine):
    """Trap 3: the table's gradient summed over ranks that hold other rows."""
    optimizer = engine.ds4sci_table_optimizer
    optimizer.groups = dataclasses.replace(optimizer.groups, dp_group=optimizer.groups.world_group, dp_size=2)


def unshifted_labels(engine):
    """Trap 7: labels shifted within each rank's part."""
    sharder = engine.ds4sci_sequence.sharder

    def labels(arguments, layout):
        local = layout.shard(arguments["labels"], 1, sharder.rank)
        return torch.nn.functional.pad(local[:, 1:], (0, 1), value=-100)

    object.__setattr__(sharder, "_labels", labels)


def replicated_table(engine):
    """Traps 3 and 4: every rank starts with rank 0's rows."""
    dist.broadcast(engine.ds4sci_table_optimizer.table.weight.data, 0)


def local_positions(engine):
    """Positions counted within each rank's part."""
    sharder = engine.ds4sci_sequence.sharder
    positions = lambda position_ids, tokens, layout: torch.arange(layout.local_len)[None]  # noqa: E731
    object.__setattr__(sharder, "_positions", positions)


def rows_of_another_rank(engine):
    """An explicit mask for the queries of the neighbour in the ring."""
    masks = engine.ds4sci_sequence.masks
    masks.rank = 1 - masks.rank


def slopes_of_other_heads(engine):
    """Trap 12: ALiBi's slopes in another order than the heads."""
    state = engine.ds4sci_sequence
    state.slopes = state.slopes.flip(0)


def image_counted_half(engine):
    """What every rank computes alike, counted like a part of the sequence."""
    engine.module.vit.layernorm.register_forward_hook(lambda module, inputs, output: scale_gradient(output, 0.5))


def one_slot_for_all_layers(engine):
    """What layers start from, written over by the next layer."""
    pool = engine.ds4sci_checkpoint_offload.pool = HostPool(pinned=False)
    slot = pool.take(2**20)
    pool.take = lambda nbytes: slot


WAITING = {"activation_checkpointing": {"kind": "full", "cpu_offload": True}}

MUTATIONS = {
    "wrong scale, ZeRO 0": (Case("gpt2", stage=0), wrong_scale),
    "wrong scale, ZeRO 3": (Case("gpt2", stage=3), wrong_scale),
    "DeepSpeed's own divisor, ZeRO 0": (Case("gpt2", stage=0), deepspeeds_own_divisor),
    "DeepSpeed's own divisor, ZeRO 2": (Case("gpt2", stage=2), deepspeeds_own_divisor),
    "loss of this rank alone": (Case("gpt2", variant="padding"), loss_of_this_rank_alone),
    "wrong group": (Case("gpt2", sharded_table=True), wrong_group),
    "unshifted labels": (Case("gpt2"), unshifted_labels),
    "replicated table": (Case("gpt2", sharded_table=True), replicated_table),
    "local positions": (Case("llama"), local_positions),
    "rows of another rank": (
        Case("llama", mode="ring", features={"attention_mask": {"kind": "causal"}}),
        rows_of_another_rank,
    ),
    "slopes of other heads": (
        Case("gpt2", features={"position_embedding": {"kind": "alibi"}}),
        slopes_of_other_heads,
    ),
    "image counted half": (Case("vit"), image_counted_half),
    "one slot for all layers": (Case("llama", features=WAITING), one_slot_for_all_layers),
}


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made while it is on."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for each in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return output


def largest_tensor(gathered, rows=8192):
    """Elements of the largest tensor of a step, elements of the table, and shapes of what is kept of it."""
    from tests.distributed import tiny_models

    tiny_models.POSITIONS = rows
    try:
        adamw = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
        buckets = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}  # buffers, by default of 5e8 elements
        engine, *_ = engine_of(case=Case("gpt2", sharded_table=True, stage=1, optimizer=adamw, zero=buckets))
    finally:
        tiny_models.POSITIONS = 64
    optimizer = engine.ds4sci_table_optimizer
    table = optimizer.table
    if gathered:
        table.forward = lambda ids: torch.nn.functional.embedding(ids, gathered_table(table, table.weight.detach()))
    shapes = {"weight": tuple(table.weight.shape)}
    with _Largest() as largest:
        engine.backward(engine(**tiny_models.batch("gpt2", 1, 16, 0)).loss)
        shapes["gradient"] = None if gathered else tuple(table.weight.grad.shape)
        engine.step()
    state = optimizer.optimizer.state[table.weight]
    shapes["state"] = tuple(state["exp_avg"].shape)
    return largest.numel, table.num_positions * table.dim, shapes


def run_mutations():
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    deepspeed.init_distributed("gloo")
    results = {name: run_case(case, mutate) for name, (case, mutate) in MUTATIONS.items()}
    return results, {gathered: largest_tensor(gathered) for gathered in (False, True)}

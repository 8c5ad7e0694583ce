# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_engine_checkpoint.py run."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import tiny_models
from tests.distributed.behaviour_worker import engine_of, message_of
from tests.distributed.engine_worker import Case, full, gathered_table, on_device

ADAMW = {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}}


def make(stage, size, model="gpt2", table=True, dropout=0.0):
    case = Case(model, size=size, stage=stage, sharded_table=table, optimizer=ADAMW, clipping=0.5)
    config = case.ds_config(dist.get_world_size() // size)
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.05}}
    built = tiny_models.build(model)
    for module in built.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return engine_of(model=built, config=config)[0]


def train(engine, steps, first, size):
    groups = engine.ds4sci_sequence.groups
    for step in range(first, first + steps):
        batch = tiny_models.batch("gpt2", groups.dp_size, 16, step)
        rows = {name: value[groups.dp_rank : groups.dp_rank + 1] for name, value in batch.items()}
        engine.backward(engine(**on_device(rows)).loss)
        engine.step()


def snapshot(engine):
    """Weights by name, and the table's rows and optimizer state put together."""
    found = {name: full(parameter) for name, parameter in engine.module.named_parameters()}
    if hasattr(engine, "ds4sci_table_optimizer"):
        optimizer = engine.ds4sci_table_optimizer
        table, state = optimizer.table, optimizer.optimizer.state[optimizer.table.weight]
        found["table"] = gathered_table(table, table.weight.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"table {key}"] = gathered_table(table, state[key])
        found["table steps"] = torch.as_tensor(float(state["step"]))
    found["lr"] = torch.tensor(engine.get_lr())
    return found


def differences(one, other):
    """Names whose tensors are not bit-identical."""
    return sorted(name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name]))


def resume(folder, stage):
    """Two steps, save, two steps; against a new engine that loads and takes the last two. With dropout."""
    torch.manual_seed(5)
    engine = make(stage, 2, dropout=0.2)
    train(engine, 2, 0, 2)
    engine.save_checkpoint(folder)
    train(engine, 2, 2, 2)
    expected = snapshot(engine)
    torch.manual_seed(6)
    other = make(stage, 2, dropout=0.2)
    other.load_checkpoint(folder)
    train(other, 2, 2, 2)
    return differences(expected, snapshot(other)), sorted(os.listdir(Path(folder) / "global_step2"))


def other_size(folder, stage, saved_size, loaded_size):
    """What differs between the engine that saved and one with another number of ranks per sequence that loaded."""
    engine = make(stage, saved_size)
    train(engine, 2, 0, saved_size)
    engine.save_checkpoint(folder)
    saved = snapshot(engine)
    other = make(stage, loaded_size)
    other.load_checkpoint(folder)
    loaded = snapshot(other)
    train(other, 1, 2, loaded_size)
    return differences(saved, loaded)


def damaged(folder):
    """Messages for checkpoints that are not whole, and which checkpoint is chosen after a crash in a save."""
    engine = make(1, 2)
    train(engine, 1, 0, 2)
    engine.save_checkpoint(folder)
    before = snapshot(engine)
    shard = Path(folder) / "global_step1" / "ds4sci_position_table_00001_of_00002.pt"
    content = shard.read_bytes()
    found = {}

    def on_rank_0(action):
        dist.barrier()
        if dist.get_rank() == 0:
            action()
        dist.barrier()

    on_rank_0(lambda: shard.unlink())
    found["missing"] = message_of(engine.load_checkpoint, folder)
    on_rank_0(lambda: shard.write_bytes(content[: len(content) // 2]))
    found["damaged"] = message_of(engine.load_checkpoint, folder)
    on_rank_0(lambda: shard.write_bytes(content))

    train(engine, 1, 1, 2)
    save = engine._save_checkpoint

    def crash(*args, **kwargs):
        raise RuntimeError("the machine stopped")

    engine._save_checkpoint = crash
    found["crash"] = message_of(engine.save_checkpoint, folder)
    engine._save_checkpoint = save
    engine.load_checkpoint(folder)
    found["chosen"] = (Path(folder) / "latest").read_text()
    found["differs"] = differences(before, snapshot(engine))
    positions = tiny_models.POSITIONS
    tiny_models.POSITIONS = 96
    larger = make(1, 2)
    tiny_models.POSITIONS = positions
    found["shape"] = message_of(larger.load_checkpoint, folder)
    return found


def unsharded(folder):
    """A checkpoint of an unsharded table is taken by a sharded one; what differs."""
    engine = make(0, 2, table=False)
    train(engine, 1, 0, 2)
    engine.save_checkpoint(folder)
    saved = snapshot(engine)
    other = make(0, 2)
    other.load_checkpoint(folder, load_optimizer_states=False)
    table = other.ds4sci_table_optimizer.table
    loaded = gathered_table(table, table.weight.detach())
    return torch.equal(saved["transformer.wpe.weight"], loaded)


def run(calls):
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    deepspeed.init_distributed(dist.get_backend())
    torch.use_deterministic_algorithms(True, warn_only=True)  # runs are compared bit by bit; on a GPU some ops vary
    return {(name, *arguments): globals()[name](folder, *arguments) for name, folder, *arguments in calls}

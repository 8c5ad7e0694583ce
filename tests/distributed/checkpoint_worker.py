# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_engine_checkpoint.py run."""

import json
import logging
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from deepspeed_ds4sci.checkpoint import exported_state_dict, to_universal, whole_state_dict
from tests.distributed import tiny_models
from tests.distributed.behaviour_worker import engine_of, message_of
from tests.distributed.engine_worker import Case, full, gathered_table, on_device, relative_error

# The key bias has no gradient but rounding, which a smaller eps would turn into steps.
ADAMW = {"type": "AdamW", "params": {"lr": 0.02, "eps": 1e-4, "torch_adam": True}}
ROWS = 4  # sequences of a step, however many ranks there are


def make(stage, size, model="gpt2", table=True, dropout=0.0, mode="ulysses", universal=False, dtype="fp32"):
    """An engine; size 1: without a `ds4sci` block."""
    case = Case(
        model,
        size=size,
        mode=mode,
        stage=stage,
        sharded_table=table,
        optimizer=ADAMW,
        clipping=0.5,
        zero={"stage3_gather_16bit_weights_on_model_save": True},
    )
    dp_size = dist.get_world_size() // size
    config = case.ds_config(dp_size)
    if size == 1:
        del config["ds4sci"]
    config |= {"train_batch_size": ROWS, "gradient_accumulation_steps": ROWS // dp_size}
    config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 5, "warmup_max_lr": 0.05}}
    config["checkpoint"] = {"load_universal": universal}
    config["bf16"] = {"enabled": dtype == "bf16"}
    built = tiny_models.build(model)
    for module in built.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return engine_of(model=built, config=config)[0]


def train(engine, steps, first, size):
    dp_size = dist.get_world_size() // size
    for step in range(first, first + steps):
        # As many labels in each row: the mean of micro-batches is then that of the step, whoever takes which row.
        batch = tiny_models.batch("gpt2", ROWS, 16, step, ignored=0)
        for row in range(dist.get_rank() // size, ROWS, dp_size):
            rows = {name: value[row : row + 1] for name, value in batch.items()}
            engine.backward(engine(**on_device(rows)).loss)
            engine.step()


def snapshot(engine):
    """Weights by name, and the table's rows and optimizer state put together."""
    found = {name: full(parameter) for name, parameter in engine.module.named_parameters()}
    if hasattr(engine, "ds4sci_table_optimizer"):
        optimizer = engine.ds4sci_table_optimizer
        table, state = optimizer.table, optimizer.optimizer.state[optimizer.table.weight]
        found["table"] = gathered_table(table, table.weight.detach())
        for key in ("exp_avg", "exp_avg_sq") if state else ():  # there is none before the first step
            found[f"table {key}"] = gathered_table(table, state[key])
        found["table steps"] = torch.as_tensor(float(state.get("step", 0)))
    if "transformer.wpe.weight" in found:
        found["table"] = found.pop("transformer.wpe.weight")
    found["lr"] = torch.tensor(engine.get_lr())
    return found


def distance(one, other):
    """(largest distance of two snapshots, of what), relative to the tensor's largest value, over what both have."""
    names = one.keys() & other.keys()
    assert {"table", "lr", "transformer.wte.weight"} <= names
    return max((relative_error(one[name], other[name]), name) for name in names)


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


def switched(folder, saved, loaded):
    """Two steps, save, two steps; against an engine of another kind that loads and takes the last two.

    saved, loaded: (ZeRO stage, ranks per sequence, mode). Another stage goes through a universal checkpoint, and so
    does a table that is sharded in one of the two only.
    """
    (stage, size, mode), (other_stage, other_size, other_mode) = saved, loaded
    universal = stage != other_stage or 1 in (size, other_size)
    engine = make(stage, size, mode=mode, table=size > 1)
    train(engine, 2, 0, size)
    engine.save_checkpoint(folder)
    train(engine, 2, 2, size)
    if dist.get_rank() == 0 and universal:
        to_universal(Path(folder) / "global_step2")
    dist.barrier()
    other = make(other_stage, other_size, mode=other_mode, table=other_size > 1, universal=universal)
    other.load_checkpoint(folder)
    train(other, 2, 2, other_size)
    return distance(snapshot(engine), snapshot(other))


def optimizer_states(engine):
    """fp32 weights, Adam's averages and the number of steps by parameter, bit for bit; the table's too."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {name: each for name, each in snapshot(engine).items() if name == "lr" or name.startswith("table")}
    masters = {}  # {bf16 parameter: its fp32 weight}, at stage 0
    if engine.zero_optimization_stage() == 0 and hasattr(engine.optimizer, "fp32_groups"):
        for lower, higher in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            masters |= dict(zip(lower, higher, strict=True))
    for name, parameter in engine.module.named_parameters():
        name = name.replace("transformer.wpe.weight", "table")
        if engine.zero_optimization_stage() == 0:
            own = masters.get(parameter, parameter)
            state = engine.basic_optimizer.state[own]
            own, first, second = own.detach(), state["exp_avg"], state["exp_avg_sq"]
        else:
            own = safe_get_full_fp32_param(parameter)
            first, second = (safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq"))
        found |= {name: own.clone(), f"{name} exp_avg": first.clone(), f"{name} exp_avg_sq": second.clone()}
    steps = {float(state["step"]) for state in engine.basic_optimizer.state.values()}
    assert len(steps) == 1
    return found | {"steps": torch.tensor(steps.pop())}


def restaged(folder, saved, loaded, dtype="fp32"):
    """What of weights and optimizer states changes on the way to another ZeRO stage and back, bit for bit.

    saved, loaded: (ZeRO stage, whether the table is sharded).
    """

    def loaded_from(stage, table):
        if dist.get_rank() == 0:
            to_universal(Path(folder) / "global_step2")
        dist.barrier()
        engine = make(stage, 2, table=table, universal=True, dtype=dtype)
        engine.load_checkpoint(folder)
        return engine

    engine = make(saved[0], 2, table=saved[1], dtype=dtype)
    train(engine, 2, 0, 2)
    engine.save_checkpoint(folder)
    expected = optimizer_states(engine)
    other = loaded_from(*loaded)
    found = differences_of_both(expected, optimizer_states(other))
    on_rank_0(lambda: shutil.rmtree(Path(folder) / "global_step2_universal"))
    other.save_checkpoint(folder)
    return found, differences_of_both(expected, optimizer_states(loaded_from(*saved)))


def differences_of_both(one, other):
    """As `differences`; what a table that is sharded in one of the two lacks of its own there is left out."""
    names = {"table steps"}
    assert one.keys() ^ other.keys() <= names
    return differences(*({name: each for name, each in found.items() if name not in names} for found in (one, other)))


def other_stage_refused(folder):
    """The messages of loading what does not fit an engine, by what it is, and what that changed in one at stage 0."""
    engine = make(1, 2)
    train(engine, 1, 0, 2)
    engine.save_checkpoint(folder)
    plain = make(0, 2)
    before, found = snapshot(plain), {}
    found["stage 3"] = message_of(make(3, 2).load_checkpoint, folder)
    found["stage 0"] = message_of(plain.load_checkpoint, folder)
    on_rank_0(lambda: to_universal(Path(folder) / "global_step1"))
    found["universal"] = message_of(plain.load_checkpoint, folder, tag="global_step1_universal")
    plain.save_checkpoint(folder, tag="plain", save_latest=False)
    found["from stage 0"] = message_of(engine.load_checkpoint, folder, tag="plain")
    other = make(0, 2, universal=True)
    found["plain"] = message_of(other.load_checkpoint, folder, tag="plain")
    whole = Path(folder) / "global_step1_universal"
    for name, damage in (
        ("parameter", lambda zero: (zero / "transformer.h.1.ln_1.bias" / "fp32.pt").unlink()),
        ("shape", lambda zero: torch.save({"param": torch.ones(3)}, zero / "transformer.wte.weight" / "fp32.pt")),
        ("groups", lambda zero: torch.save({"param_groups": [{}, {}]}, zero / "optimizer_state.pt")),
    ):

        def copy(name=name, damage=damage):
            shutil.copytree(whole, Path(folder) / name)
            (Path(folder) / name / "ds4sci_checkpoint.json").unlink()  # it would tell
            damage(Path(folder) / name / "zero")

        on_rank_0(copy)
        found[name] = message_of(other.load_checkpoint, folder, tag=name)
    return found, differences(before, snapshot(plain)) + differences(before, snapshot(other))


def saved_by_two_ranks(folder):
    """What four ranks are to go on from; rank 0 leaves what two ranks come to."""
    engine = make(1, 2)
    train(engine, 2, 0, 2)
    engine.save_checkpoint(folder)
    train(engine, 2, 2, 2)
    found = snapshot(engine)
    if dist.get_rank() == 0:
        to_universal(Path(folder) / "global_step2")
        torch.save(found, Path(folder) / "expected.pt")
    dist.barrier()


def loaded_by_four_ranks(folder):
    """(distance from what two ranks come to, the message without conversion)."""
    message = message_of(make(1, 4).load_checkpoint, folder)
    engine = make(1, 4, mode={"ulysses": 2, "ring": 2}, universal=True)
    engine.load_checkpoint(folder)
    train(engine, 2, 2, 4)
    return distance(torch.load(Path(folder) / "expected.pt"), snapshot(engine)), message


def exported(folder, stage):
    """For each way to a whole state dict: what differs from the weights, and how far the logits of a plain model that
    loads it are from the engine's. And the message of a state dict that would lack the table."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine = make(stage, 2)
    train(engine, 2, 0, 2)
    engine.save_checkpoint(folder)
    refusal = message_of(engine.module.state_dict)
    state = whole_state_dict(engine)
    engine.save_16bit_model(folder, "model.bin")
    tokens = {"input_ids": tiny_models.batch("gpt2", 2, 16, 9)["input_ids"]}
    engine.eval()
    with torch.no_grad():
        logits = engine(**tokens).logits
    weights = snapshot(engine)
    if dist.get_rank() != 0:
        return state, refusal
    expected = {name: each for name, each in weights.items() if name != "lr" and not name.startswith("table")}
    expected["transformer.wpe.weight"] = weights["table"]
    engine.module.save_pretrained(f"{folder}/pretrained", state_dict=dict(state))  # it empties the dict
    ways = {
        "whole_state_dict": state,
        "save_pretrained": type(engine.module).from_pretrained(f"{folder}/pretrained").state_dict(),
        "save_16bit_model": torch.load(Path(folder) / "model.bin"),
        "export": exported_state_dict(folder),
    }
    if stage > 0:
        ways["zero_to_fp32"] = get_fp32_state_dict_from_zero_checkpoint(folder)
    plain, found = tiny_models.build("gpt2").eval(), {}
    for way, each in ways.items():
        plain.load_state_dict(dict(each))
        with torch.no_grad():
            distance = (plain(**tokens).logits - logits).abs().max().item()
        found[way] = differences(expected, {name: each[name] for name in expected}), distance
    return found, refusal


def data_position(folder):
    """(samples that would have come after a save, those that come after a load, what a loader already begun gives)."""

    def loader_of():
        case = Case("gpt2", stage=1, sharded_table=True, optimizer=ADAMW)
        numbers = [{"input_ids": torch.full((4,), n), "labels": torch.full((4,), n)} for n in range(12)]
        engine, _, loader, _ = engine_of(case=case, training_data=numbers)
        return engine, loader

    def samples(loader):
        return [int(batch["input_ids"][0, 0]) for batch in loader]

    engine, loader = loader_of()
    batches = iter(loader)
    for _ in range(5):
        engine.backward(engine(**next(batches)).loss)
        engine.step()
    engine.save_checkpoint(folder)
    rest = samples(batches)
    whole = samples(loader)
    other, other_loader = loader_of()
    begun = iter(other_loader)
    next(begun)
    other.load_checkpoint(folder)
    after = samples(begun)
    third, third_loader = loader_of()
    third.load_checkpoint(folder)
    return {
        "rest": rest,
        "begun": after,
        "loaded": samples(third_loader),
        "next epoch": samples(third_loader) == whole,
    }


def on_rank_0(action):
    dist.barrier()
    if dist.get_rank() == 0:
        action()
    dist.barrier()


def flipped(path):
    """Changes one bit in the middle of a file; once more, and it is as before."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damaged(folder):
    """Messages for checkpoints that are not whole, and which checkpoint is chosen after a crash in a save."""
    engine = make(1, 2)
    train(engine, 1, 0, 2)
    engine.save_checkpoint(folder)
    before = snapshot(engine)
    shard = Path(folder) / "global_step1" / "ds4sci_position_table_00001_of_00002.pt"
    content = shard.read_bytes()
    found = {}
    train(engine, 1, 1, 2)
    later = snapshot(engine)
    on_rank_0(lambda: shard.unlink())
    found["missing"] = message_of(engine.load_checkpoint, folder)
    on_rank_0(lambda: shard.write_bytes(content[: len(content) // 2]))
    found["damaged"] = message_of(engine.load_checkpoint, folder)
    on_rank_0(lambda: shard.write_bytes(content))
    for name, path in (
        ("missing of DeepSpeed", shard.with_name("zero_pp_rank_1_mp_rank_00_optim_states.pt")),
        ("manifest", shard.with_name("ds4sci_checkpoint.json")),
    ):
        whole = path.read_bytes()
        on_rank_0(path.unlink if name.startswith("missing") else lambda path=path: path.write_text("{"))
        found[name] = message_of(engine.load_checkpoint, folder)
        on_rank_0(lambda path=path, whole=whole: path.write_bytes(whole))
    found["tag"] = message_of(engine.load_checkpoint, folder, tag="global_step9")
    found["changed"] = differences(later, snapshot(engine))
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


FLIPPED = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "ds4sci_position_table_00000_of_00002.pt",
    "ds4sci_random_00001_of_00002.pt",
)


def flipped_bits(folder):
    """For each of FLIPPED: the messages of load, export and conversion, and what a refused load changed; then what
    differs after a load of the checkpoint before; who has summed up what; and what is logged without the list."""
    engine = make(1, 2)
    train(engine, 1, 0, 2)
    engine.save_checkpoint(folder)
    before = snapshot(engine)
    train(engine, 1, 1, 2)
    engine.save_checkpoint(folder)
    train(engine, 1, 2, 2)
    later, found = snapshot(engine), {}
    last = Path(folder) / "global_step2"
    for name in FLIPPED:
        on_rank_0(lambda name=name: flipped(last / name))
        messages = [message_of(call, folder) for call in (engine.load_checkpoint, exported_state_dict)]
        found[name] = [*messages, message_of(to_universal, last)], differences(later, snapshot(engine))
        on_rank_0(lambda name=name: flipped(last / name))
    manifest = json.loads((last / "ds4sci_checkpoint.json").read_text())
    dist.barrier()
    engine.load_checkpoint(folder, tag="global_step1")
    found["before"] = differences(before, snapshot(engine))
    on_rank_0((Path(folder) / "global_step1" / "ds4sci_checkpoint.json").unlink)
    lines = found["unlisted"] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("deepspeed_ds4sci").addHandler(handler)
    engine.load_checkpoint(folder, tag="global_step1")
    logging.getLogger("deepspeed_ds4sci").removeHandler(handler)
    found["writers"] = {name: entry["writer"] for name, entry in manifest["files"].items() if "writer" in entry}
    return found


def unsharded(folder):
    """A checkpoint of an unsharded table is taken by a sharded one; what differs."""
    engine = make(0, 2, table=False)
    train(engine, 1, 0, 2)
    engine.save_checkpoint(folder)
    saved = snapshot(engine)
    other = make(0, 2)
    before = snapshot(other)
    refused = {
        "with states": message_of(other.load_checkpoint, folder),
        "stage 3": message_of(make(3, 2).load_checkpoint, folder, load_optimizer_states=False),
    }
    changed = differences(before, snapshot(other))
    other.load_checkpoint(folder, load_optimizer_states=False)
    table = other.ds4sci_table_optimizer.table
    loaded = gathered_table(table, table.weight.detach())
    other.save_checkpoint(folder, tag="run/sharded")
    refused["back"] = message_of(engine.load_checkpoint, folder, tag="run/sharded", load_optimizer_states=False)
    loaded_again = other.load_checkpoint(folder)[0]
    return torch.equal(saved["table"], loaded), refused, changed, loaded_again


def run(calls):
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    deepspeed.init_distributed(dist.get_backend())
    if dist.get_backend() == "nccl":  # runs are compared bit by bit, and some ops of a GPU vary
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # DeepSpeed's buckets have 5e8 elements
    return {call: globals()[name](folder, *arguments) for call, (name, folder, *arguments) in enumerate(calls)}

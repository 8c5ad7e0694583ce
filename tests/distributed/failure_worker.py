# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_engine_failures.py run: ranks that die in the middle of a step or of a save."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import tiny_models
from tests.distributed.behaviour_worker import engine_of
from tests.distributed.checkpoint_worker import differences, make, snapshot, train
from tests.distributed.engine_worker import Case


def set_up():
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    deepspeed.init_distributed("gloo")


def die_in_a_step(mode, path):
    """Rank 1 goes away between two layers of the second step, without an error code that would end the launch, and
    leaves the file `path`."""
    set_up()
    engine = engine_of(case=Case("gpt2", mode=mode))[0]
    batch = tiny_models.batch("gpt2", 1, 16, 0)
    engine.backward(engine(**batch).loss)
    engine.step()

    def die(module, inputs):
        Path(path).touch()
        os._exit(0)

    if dist.get_rank() == 1:
        engine.module.transformer.h[1].register_forward_pre_hook(die)
    engine.backward(engine(**batch).loss)


def _kill_myself(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_save(folder, moment):
    """Saves, trains on, and is killed in the next save: while rank 1 writes, or while rank 0 names the files."""
    from deepspeed_ds4sci.hooks import engine_checkpoint

    set_up()
    engine = make(1, 2)
    train(engine, 1, 0, 2)
    engine.save_checkpoint(folder, tag="kept")
    torch.save(snapshot(engine), Path(folder) / f"expected-{dist.get_rank()}.pt")
    train(engine, 1, 1, 2)
    if moment == "writing" and dist.get_rank() == 1:
        engine.checkpoint_engine.save = _kill_myself
    if moment == "naming" and dist.get_rank() == 0:
        rename = Path.rename

        def killed_rename(path, target):
            _kill_myself() if path.name.endswith(".partial") else rename(path, target)

        Path.rename = killed_rename
    if moment == "choosing" and dist.get_rank() == 0:
        engine_checkpoint.replace_text = _kill_at_latest(engine_checkpoint.replace_text)
    engine.save_checkpoint(folder, tag="kept" if moment == "naming" else "second")


def _kill_at_latest(replace):
    def killed(path, text):
        _kill_myself() if path.name == "latest" else replace(path, text)

    return killed


def load_after_a_kill(folders):
    """{moment: (tag that is chosen, what differs from the checkpoint before)}."""
    set_up()
    found = {}
    for moment, folder in folders.items():
        engine = make(1, 2)
        path, _ = engine.load_checkpoint(folder)
        expected = torch.load(Path(folder) / f"expected-{dist.get_rank()}.pt")
        found[moment] = Path(path).parent.name, differences(expected, snapshot(engine))
        train(engine, 1, 1, 2)
        engine.save_checkpoint(folder, tag="second")
    return found

# SPDX-License-Identifier: Apache-2.0
"""Random states in DeepSpeed's checkpoints, which hold none: one file per rank.

With them a run that goes on from a checkpoint draws what it would have drawn: Python's, NumPy's and torch's
generators of the script, and the generator inside the model that differs between the ranks of a sequence group.
"""

import functools
import logging
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_ds4sci.hooks.sequence_state import generator_state, set_generator_state

logger = logging.getLogger(__name__)


class RandomCheckpoint:
    """Saves and restores the random states of this rank.

    Args:
        engine: its save_checkpoint and load_checkpoint are wrapped.
        state: the engine's SequenceState.
    """

    def __init__(self, engine, state):
        self.engine, self.state = engine, state

    def install(self):
        self.engine.save_checkpoint = functools.partial(self._save_checkpoint, self.engine.save_checkpoint)
        self.engine.load_checkpoint = functools.partial(self._load_checkpoint, self.engine.load_checkpoint)

    def _path(self, folder):
        return Path(folder) / f"ds4sci_random_{dist.get_rank():05d}_of_{dist.get_world_size():05d}.pt"

    def _save_checkpoint(self, original, save_dir, tag=None, *args, **kwargs):
        tag = str(f"global_step{self.engine.global_steps}" if tag is None else tag)
        path = self._path(Path(save_dir) / tag)
        path.parent.mkdir(parents=True, exist_ok=True)
        kind, keys, *rest = np.random.get_state()
        states = {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
            "torch": generator_state(),
            "model": self.state.random.state,
        }
        partial = path.with_suffix(".partial")
        torch.save(states, partial)
        os.replace(partial, path)
        dist.barrier()
        return original(save_dir, tag, *args, **kwargs)

    def _load_checkpoint(self, original, load_dir, tag=None, *args, **kwargs):
        result = original(load_dir, tag, *args, **kwargs)
        if result[0] is None or kwargs.get("load_module_only", False):
            return result
        path = self._path(Path(load_dir) / (tag or (Path(load_dir) / "latest").read_text().strip()))
        if not path.exists():
            if dist.get_rank() == 0:
                logger.warning("the checkpoint has no random states for this number of ranks: %s is missing", path)
            return result
        states = torch.load(path, map_location="cpu", weights_only=True)
        kind, keys, *rest = states["numpy"]
        random.setstate(states["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        set_generator_state(states["torch"])
        self.state.random.state = states["model"]
        return result

# SPDX-License-Identifier: Apache-2.0
"""Random states in DeepSpeed's checkpoints, which hold none: one file per rank.

With them a run that goes on from a checkpoint draws what it would have drawn: Python's, NumPy's and torch's
generators of the script, and the generator inside the model that differs between the ranks of a sequence group.
"""

import logging
import random

import numpy as np
import torch
import torch.distributed as dist

from deepspeed_ds4sci.checkpoint.table_files import load_whole, save_whole
from deepspeed_ds4sci.hooks.sequence_state import generator_state, set_generator_state

logger = logging.getLogger(__name__)


class RandomCheckpoint:
    """The random states of this rank, a part of `EngineCheckpoint`.

    Args:
        state: the engine's SequenceState; None: sequences are not split, and the model draws from torch's generator.
    """

    def __init__(self, state):
        self.state = state

    def _path(self, folder):
        return folder / f"ds4sci_random_{dist.get_rank():05d}_of_{dist.get_world_size():05d}.pt"

    def write(self, folder):
        kind, keys, *rest = np.random.get_state()
        states = {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
            "torch": generator_state(),
            "model": None if self.state is None else self.state.random.state,
        }
        save_whole(states, self._path(folder))
        return self._path(folder)

    def check(self, folder):
        path = self._path(folder)
        if path.exists():
            load_whole(path)

    def read(self, folder, module_only, optimizer_states):
        if module_only:
            return
        path = self._path(folder)
        if not path.exists():
            if dist.get_rank() == 0:
                logger.warning("the checkpoint has no random states for this number of ranks: %s is missing", path)
            return
        states = load_whole(path)
        kind, keys, *rest = states["numpy"]
        random.setstate(states["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        set_generator_state(states["torch"])
        if self.state is not None:
            self.state.random.state = states["model"]

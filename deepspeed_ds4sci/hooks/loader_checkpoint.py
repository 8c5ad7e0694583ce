# SPDX-License-Identifier: Apache-2.0
"""The position of the loader that DeepSpeed builds from `training_data`, which its checkpoints do not hold."""

import torch.distributed as dist
from torch.utils.data import DistributedSampler

from deepspeed_ds4sci.checkpoint.table_files import load_whole, save_whole
from deepspeed_ds4sci.data.resumable import ResumableSampler


class EngineLoader:
    """DeepSpeed's loader, which goes on after `load_checkpoint` with the batch that would have come next.

    A part of `EngineCheckpoint`. Order and batches are DeepSpeed's own; every epoch has the same order, as there.
    """

    FILE = "ds4sci_data.pt"

    def __init__(self, loader):
        own = loader.data_sampler
        self.sampler = ResumableSampler(
            loader.dataset, own.num_replicas, own.rank, own.shuffle, own.seed, own.drop_last, reshuffle=False
        )
        loader.data_sampler = self.sampler
        self._loader, self._batches = loader, None

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        self._batches = self.sampler.track(iter(self._loader))
        return self

    def __next__(self):
        return next(self._batches)

    def write(self, folder):
        if dist.get_rank() != 0:
            return None
        save_whole(self.sampler.state_dict(), folder / self.FILE)
        return folder / self.FILE

    def check(self, folder):
        if (folder / self.FILE).exists():
            state, before = load_whole(folder / self.FILE), self.sampler.state_dict()
            self.sampler.load_state_dict(state)
            self.sampler.load_state_dict(before)

    def read(self, folder, module_only, optimizer_states):
        if module_only or not (folder / self.FILE).exists():
            return
        self.sampler.load_state_dict(load_whole(folder / self.FILE))
        if self._batches is not None:  # a script, or RepeatingLoader, has begun to iterate
            iter(self)


def make_resumable(engine) -> None:
    """Gives the engine such a loader, if it built one that draws with DeepSpeed's usual sampler."""
    loader = engine.training_dataloader
    if loader is not None and type(loader.data_sampler) is DistributedSampler:
        engine.training_dataloader = EngineLoader(loader)
        engine.ds4sci_checkpoint.parts.append(engine.training_dataloader)

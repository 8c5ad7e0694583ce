# SPDX-License-Identifier: Apache-2.0
"""A sampler that goes on where a checkpoint was saved, with as many data-parallel ranks as there are now."""

from collections.abc import Iterable, Iterator

from torch.utils.data import DistributedSampler


class ResumableSampler(DistributedSampler):
    """torch's DistributedSampler, which knows how far training has come in the epoch.

        sampler = ResumableSampler(dataset, num_replicas=engine.dp_world_size, rank=data_parallel_rank)
        loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=4)
        engine.load_checkpoint(...)[1]  ->  sampler.load_state_dict(client_state["data"])
        for batch in sampler.track(loader): ...      # one epoch, or what is left of it
        engine.save_checkpoint(folder, client_state={"data": sampler.state_dict()})

    Under sequence parallelism the data-parallel rank is `engine.ds4sci_sequence.groups.dp_rank`: all ranks of a
    sequence group take the same samples.

    Args:
        dataset, num_replicas, rank, shuffle, seed, drop_last: see DistributedSampler.
        reshuffle: each epoch has an order of its own, so that `set_epoch` need not be called.
    """

    def __init__(self, dataset, num_replicas=None, rank=None, shuffle=True, seed=0, drop_last=False, reshuffle=True):
        super().__init__(dataset, num_replicas, rank, shuffle, seed, drop_last)
        self.reshuffle = reshuffle
        self.position = 0
        """Samples of this epoch that training has had, on all replicas together."""

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self.position // self.num_replicas :])

    def track(self, loader: Iterable) -> Iterator:
        """The batches of a DataLoader over this sampler, to the end of the epoch, counted as they are handed out.

        Workers of the loader run ahead; what they have fetched and training has not had is fetched again on resume.
        """
        for batch in loader:
            self.position = min(self.position + loader.batch_size * self.num_replicas, self.total_size)
            yield batch
        self.position = 0
        if self.reshuffle:
            self.epoch += 1

    def state_dict(self) -> dict[str, int | bool]:
        """The same on every rank."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """The next iteration goes on where `state` was taken.

        Raises:
            ValueError: it is of other data, of another order, or its position does not fall between batches here.
        """
        for name, mine in self._identity().items():
            if state[name] != mine:
                raise ValueError(f"the saved data position must be of {name} = {mine}, got {state[name]}")
        if state["position"] % self.num_replicas:
            raise ValueError(
                f"{state['position']} samples of the epoch had been used, which {self.num_replicas} data-parallel "
                "ranks cannot have had in equal parts; go on with a number of ranks that divides it"
            )
        self.epoch, self.position = state["epoch"], state["position"]

    def _identity(self):
        return {"length": len(self.dataset), "shuffle": self.shuffle, "seed": self.seed, "drop_last": self.drop_last}

# SPDX-License-Identifier: Apache-2.0
"""Windows of genome tokens as a stream: shuffled, sharded over data-parallel ranks, resumable.

Every rank reads every file and keeps its windows: reading is many times faster than training, and windows can then be
dealt out in turn whatever the files' sizes are. At most `shuffle` windows and one piece of a file are in memory.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from deepspeed_ds4sci.data.genomes.documents import NO_DOCUMENT, Sequences, Window, cut_windows, token_pieces
from deepspeed_ds4sci.data.genomes.tokenizer import TOKENIZERS

IGNORE = -100
"""Label of a token that is not predicted: padding, and the first of a document or window."""

Part = Literal["all", "train", "held_out"]


@dataclass(frozen=True, kw_only=True)
class GenomeDataConfig:
    """What the windows are. A state of the dataset fits a dataset with the same values only."""

    context: int
    """Tokens per window."""
    tokens: Literal["codon", "nucleotide"] = "codon"
    sequences: Sequences = "genome"
    """See `documents.Sequences`."""
    packed: bool = True
    """Short documents share a window. False: each document starts a window."""
    reverse_strand: bool = False
    """Each window of a whole genome is followed by its reverse complement. Coding sequences have one strand."""
    held_out_every: int = 0
    """Every so manieth window of a file is held out, with its reverse complement. 0: none."""
    part: Part = "all"
    shuffle: int = 0
    """Windows that are put into random order together, across files, which come in random order too. 0: file order."""
    seed: int = 0
    """Of the order."""

    def __post_init__(self):
        least = dict(context=2, held_out_every=0, shuffle=0, seed=0)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name, allowed in (("tokens", TOKENIZERS), ("sequences", get_args(Sequences)), ("part", get_args(Part))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.reverse_strand and self.sequences != "genome":
            raise ValueError(
                f'reverse_strand needs sequences = "genome", got {self.sequences!r}: genes have their own strand'
            )
        if self.part != "all" and self.held_out_every < 2:
            raise ValueError(f"part = {self.part!r} needs held_out_every of at least 2, got {self.held_out_every}")


class GenomeDataset(IterableDataset):
    """Windows of FASTA and GenBank files, plain or gzip, as tensors for a causal model.

    Items are dicts of int64 [context] tensors: `input_ids`; `labels`, aligned with them, IGNORE where nothing is to be
    predicted; `document_ids`, from 0 in each window and -1 for padding; `position_ids`, from 0 in each document, by
    which models of transformers tell documents apart.

    Args:
        paths: the files.
        config: what the windows are.
        rank, size: this data-parallel rank, and their number. Ranks that share sequences have the same rank here.
        epochs: times that the files are read; None: without end. At the end of the last one every rank has had the
            same number of items: those that are missing are windows without labels.

    Raises:
        ValueError: no files, or a rank that is not below size. While iterating: malformed files, and files without a
            window of this part.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        config: GenomeDataConfig,
        *,
        rank: int = 0,
        size: int = 1,
        epochs: int | None = None,
    ):
        self.paths = tuple(Path(path) for path in paths)
        self.config, self.rank, self.size, self.epochs = config, rank, size, epochs
        self.tokenizer = TOKENIZERS[config.tokens]
        if not self.paths:
            raise ValueError("paths must name at least one file, got none")
        if not 0 <= rank < size:
            raise ValueError(f"rank must be in [0, size = {size}), got {rank}")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs must be at least 1 or None, got {epochs}")
        self._origin = self._next = 0  # windows before this run, and before the next round of this run
        # Epoch, the file's turn in its order, where there the block starts, the block, and its first window's number.
        self._place = (0, 0, 0, 0, 0)
        self._ended = False

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        if get_worker_info() is not None:
            raise NotImplementedError(
                "GenomeDataset keeps its place in the process that iterates over it: use num_workers = 0, got a worker"
            )
        if self._ended:  # another loop over the same object is another pass; a state taken before it says the end
            self._next, self._place, self._ended = 0, (0, 0, 0, 0, 0), False
        origin = self._origin = self._next
        window = None
        number = origin
        for number, place, window in self._numbered(origin):
            if (number - origin) % self.size == self.rank:
                self._place, self._next = place, number - self.rank + self.size
                yield self.item(window)
        dealt = number + 1 - origin if window is not None else 0
        if dealt % self.size and self.rank >= dealt % self.size:
            self._next = origin + -(-dealt // self.size) * self.size
            yield self.item(window) | {"labels": torch.full((self.config.context,), IGNORE)}
        self._ended = True

    def state_dict(self) -> dict:
        """Where the stream is: the same on all ranks once they have had as many items. Plain values.

        It fits another number of ranks too: what follows is then dealt out to those.
        """
        return {"windows": self._next, "place": list(self._place), "fits": self._fits()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state` was taken: the next iteration starts there. Reads the file in work anew up to there.

        Raises:
            ValueError: the state is of other files or another configuration; the message says what differs.
        """
        mine = self._fits()
        differing = [
            f"{key} = {value!r}, got {mine[key]!r}" for key, value in state["fits"].items() if value != mine[key]
        ]
        if differing:
            raise ValueError(f"the state is of other data: it has {'; '.join(differing)}")
        self._next, self._place, self._ended = state["windows"], tuple(state["place"]), False

    def item(self, window: Window) -> dict[str, torch.Tensor]:
        """The tensors of one window."""
        tokens = torch.from_numpy(window.tokens.astype(np.int64))
        documents = torch.from_numpy(window.documents.astype(np.int64))
        starts = torch.cat([torch.ones(1, dtype=torch.bool), documents[1:] != documents[:-1]])
        labels = tokens.masked_fill(starts | (documents == NO_DOCUMENT), IGNORE)
        index = torch.arange(len(tokens))
        positions = index - torch.where(starts, index, 0).cummax(0).values
        return {"input_ids": tokens, "labels": labels, "document_ids": documents, "position_ids": positions}

    def windows_of(self, file: int) -> Iterator[Window]:
        """The windows of one file in file order: those of this part, each with its reverse complement if wanted.

        Args:
            file: number in `paths`.
        """
        config = self.config
        pieces = token_pieces(self.paths[file], self.tokenizer, config.sequences)
        for number, window in enumerate(cut_windows(pieces, config.context, config.packed)):
            held_out = config.held_out_every > 0 and number % config.held_out_every == config.held_out_every - 1
            if config.part != "all" and held_out != (config.part == "held_out"):
                continue
            yield window
            if config.reverse_strand:
                yield window.reverse_complement(self.tokenizer)

    def _numbered(self, start: int):
        """(number, place, window) from window `start` of the whole stream on, which is not before `self._place`."""
        epoch, turn, offset, block, number = self._place
        while self.epochs is None or epoch < self.epochs:
            before = number if turn == offset == 0 else None
            for where, windows in self._blocks(epoch, turn, offset, block):
                place = (epoch, *where, number)
                for window in windows:
                    if number >= start:
                        yield number, place, window
                    number += 1
            if number == before:
                raise ValueError(f"no window of part {self.config.part!r} in {', '.join(map(str, self.paths))}")
            epoch, turn, offset, block = epoch + 1, 0, 0, 0

    def _blocks(self, epoch, turn, offset, block):
        """((turn, offset, block), windows): the windows that are shuffled together, and where they start."""
        order, held, where = self._order(epoch), [], None
        for current in range(turn, len(order)):
            for index, window in enumerate(self.windows_of(order[current])):
                if current == turn and index < offset:
                    continue
                where = where or (current, index, block)
                held.append(window)
                if len(held) >= self.config.shuffle:
                    yield where, self._shuffled(held, epoch, block)
                    held, where, block = [], None, block + 1
        if held:
            yield where, self._shuffled(held, epoch, block)

    def _order(self, epoch):
        if not self.config.shuffle:
            return range(len(self.paths))
        return np.random.default_rng([self.config.seed, epoch]).permutation(len(self.paths))

    def _shuffled(self, windows, epoch, block):
        if not self.config.shuffle:
            return windows
        order = np.random.default_rng([self.config.seed, epoch, block, 1]).permutation(len(windows))
        return [windows[i] for i in order]

    def _fits(self):
        files = [[path.name, path.stat().st_size] for path in self.paths]
        return {"files": files, **dataclasses.asdict(self.config)}

# SPDX-License-Identifier: Apache-2.0
"""Held-out loss of the model and of Markov models, on the same tokens; embeddings of whole genomes."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import deepspeed.comm as dist
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deepspeed_ds4sci.data.genomes import (
    IGNORE,
    CodonFrequencies,
    GenomeDataConfig,
    GenomeDataset,
    NucleotideMarkov,
    Window,
)
from deepspeed_ds4sci.data.genomes.tokenizer import FIRST_WORD

MODEL_ARGUMENTS = ("input_ids", "document_ids", "position_ids")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that hold different sequences, and how many hold the same one."""

    data_rank: int
    data_size: int
    per_sequence: int

    @classmethod
    def of(cls, engine) -> "Ranks":
        """Of a DeepSpeed engine, with or without sequence parallelism."""
        if engine.mpu is None:
            return cls(dist.get_rank(), dist.get_world_size(), 1)
        size = engine.mpu.get_data_parallel_world_size()
        return cls(engine.mpu.get_data_parallel_rank(), size, dist.get_world_size() // size)


@dataclass(frozen=True)
class HeldOutResult:
    """Mean negative log likelihoods in nats per token, over `tokens` held-out codons or nucleotides.

    markov: order 2 over nucleotides; frequencies: of whole tokens. Both fitted to the training part of each genome.
    """

    model: float
    markov: float
    frequencies: float
    tokens: int

    @property
    def beats_markov(self) -> bool:
        return self.model < self.markov

    def to_record(self) -> dict:
        return {f"held_out_{name}": value for name, value in asdict(self).items()} | {
            "held_out_perplexity": float(np.exp(self.model))
        }


class HeldOut:
    """The held-out windows of all genomes, and the baselines, which are fitted once."""

    def __init__(self, paths: list[Path], config: GenomeDataConfig):
        self.paths = paths
        self.config = replace(config, part="held_out", shuffle=0)
        self.baselines = []
        for path in paths:
            train = GenomeDataset([path], replace(config, part="train", shuffle=0))
            windows = list(train.windows_of(0))
            models = NucleotideMarkov(train.tokenizer), CodonFrequencies(train.tokenizer)
            self.baselines.append([model.fit(windows) for model in models])

    @torch.no_grad()
    def evaluate(self, engine) -> HeldOutResult:
        """Every rank returns the same result. Special tokens are not scored."""
        ranks = Ranks.of(engine)
        totals = torch.zeros(4, dtype=torch.float64)
        engine.eval()
        for path, baselines in zip(self.paths, self.baselines, strict=True):
            for batch in _batches(engine, ranks, path, self.config):
                logits = _forward(engine, batch)["logits"]
                totals += _score(logits.cpu(), batch, baselines)
        engine.train()
        totals = totals.to(engine.device)
        dist.all_reduce(totals)
        *sums, tokens = (totals / ranks.per_sequence).tolist()
        if not tokens:
            raise ValueError(f"no held-out window in {', '.join(map(str, self.paths))}: lower --held-out-every")
        return HeldOutResult(*(value / tokens for value in sums), round(tokens))


def _batches(engine, ranks: Ranks, path: Path, config: GenomeDataConfig) -> Iterator[dict[str, Tensor]]:
    """All data-parallel ranks get the same number of batches, as ZeRO-3 needs."""
    dataset = GenomeDataset([path], config, rank=ranks.data_rank, size=ranks.data_size, epochs=1)
    yield from DataLoader(dataset, batch_size=engine.train_micro_batch_size_per_gpu())


def _forward(engine, batch):
    return engine(**{name: batch[name].to(engine.device) for name in MODEL_ARGUMENTS})


def _score(logits: Tensor, batch: dict[str, Tensor], baselines) -> Tensor:
    """fp64 [4]: summed nll of the model and of each baseline, and the number of tokens scored."""
    labels = batch["labels"]
    scored = (labels != IGNORE) & (labels >= FIRST_WORD)
    log_p = logits[:, :-1].float().log_softmax(-1)
    nll = -log_p.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    sums = [nll[scored[:, 1:]].double().sum()]
    for baseline in baselines:
        each = [
            baseline.token_nll(Window(tokens.numpy().astype(np.uint8), documents.numpy().astype(np.int32)))
            for tokens, documents in zip(batch["input_ids"], batch["document_ids"], strict=True)
        ]
        sums.append(torch.from_numpy(np.stack(each))[scored].sum())
    return torch.stack([*sums, scored.sum().double()])


@torch.no_grad()
def embed_genomes(engine, paths: list[Path], config: GenomeDataConfig) -> dict[str, np.ndarray]:
    """Mean hidden states after the last norm.

    Returns:
        "names": [genomes] str; "genomes": fp32 [genomes, hidden], over all tokens of a file; "windows": fp32
        [windows, hidden]; "genome_of_window": int64 [windows], the number in "names".
    """
    ranks = Ranks.of(engine)
    config = replace(config, part="all", held_out_every=0, shuffle=0, reverse_strand=False)
    engine.eval()
    means, owners, weights = [], [], []
    for number, path in enumerate(paths):
        for batch in _batches(engine, ranks, path, config):
            hidden = _forward(engine, batch)["hidden_states"].float()
            real = (batch["labels"] != IGNORE).to(hidden.device)  # not the filling of a last round
            count = real.sum(1)
            mean = (hidden * real[..., None]).sum(1) / count.clamp(min=1)[:, None]
            means.append(mean[count > 0].cpu())
            weights.append(count[count > 0].cpu())
            owners.append(torch.full((int((count > 0).sum()),), number))
    engine.train()
    mine = [torch.cat(each).numpy() for each in (means, owners, weights)]
    everyone = [None] * dist.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    # Ranks that share sequences found the same: one of them speaks for its data-parallel rank.
    parts = everyone[:: ranks.per_sequence]
    windows, owner, weight = (np.concatenate([part[i] for part in parts]) for i in range(3))
    genomes = [np.average(windows[owner == g], axis=0, weights=weight[owner == g]) for g in range(len(paths))]
    return {
        "names": np.array([genome_name(path) for path in paths]),
        "genomes": np.stack(genomes).astype(np.float32),
        "windows": windows,
        "genome_of_window": owner,
    }


def genome_name(path: Path) -> str:
    """The file's name without its endings."""
    return path.name.split(".")[0]


def separation(embeddings: dict[str, np.ndarray]) -> float:
    """Share of the windows that are nearest to the mean of their own genome's other windows."""
    windows, owner = embeddings["windows"], embeddings["genome_of_window"]
    groups = np.unique(owner)
    sums = np.stack([windows[owner == g].sum(0) for g in groups])
    counts = np.array([(owner == g).sum() for g in groups])
    right = 0
    for window, g in zip(windows, owner, strict=True):
        own = groups == g
        centres = (sums - own[:, None] * window) / np.maximum(counts - own, 1)[:, None]
        right += groups[np.square(centres - window).sum(1).argmin()] == g
    return right / len(windows)

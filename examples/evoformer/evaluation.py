# SPDX-License-Identifier: Apache-2.0
"""Held-out accuracy of the model and of the column profile, on the same hidden residues."""

from dataclasses import asdict, dataclass

import deepspeed.comm as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspeed_ds4sci.data import HeldOutExamples
from deepspeed_ds4sci.data.masked_msa import IGNORE


@dataclass(frozen=True)
class HeldOutResult:
    """Fractions of right residues, and mean negative log likelihoods in nats, over `positions` hidden residues."""

    model_accuracy: float
    profile_accuracy: float
    model_nll: float
    profile_nll: float
    positions: int

    @property
    def beats_profile(self) -> bool:
        return self.model_accuracy > self.profile_accuracy

    def to_record(self) -> dict:
        return {f"held_out_{name}": value for name, value in asdict(self).items()}


@torch.no_grad()
def evaluate(model: nn.Module, examples: HeldOutExamples, batch_size: int, device: torch.device) -> HeldOutResult:
    """Runs all examples, shared out over the ranks; every rank returns the same result.

    All ranks make the same number of forward passes (ZeRO-3 gathers weights in each): the last ones repeat an example
    with weight 0.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    log_profile = torch.from_numpy(examples.profile).log().to(device, torch.float32)
    was_training = model.training
    model.eval()
    totals = torch.zeros(5, dtype=torch.float64, device=device)
    for first in range(0, len(examples), batch_size * world_size):
        numbers = [first + rank * batch_size + i for i in range(batch_size)]
        rows = [examples[min(number, len(examples) - 1)] for number in numbers]
        batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        for i, number in enumerate(numbers):
            if number >= len(examples):
                batch["target"][i] = IGNORE
        logits = model(batch["shown"], batch["columns"])
        totals += _score(logits, batch["target"], log_profile[batch["columns"]])
    model.train(was_training)
    dist.all_reduce(totals)
    model_right, profile_right, model_nll, profile_nll, positions = totals.tolist()
    if not positions:
        raise ValueError("the held-out sequences have no residue to predict: raise --held-out-fraction or --mask-rate")
    return HeldOutResult(
        model_right / positions,
        profile_right / positions,
        model_nll / positions,
        profile_nll / positions,
        int(positions),
    )


def _score(logits: Tensor, target: Tensor, log_profile: Tensor) -> Tensor:
    """fp64 [5]: right by model, right by profile, summed nll of model, of profile, positions."""
    hidden = target != IGNORE
    truth = target[hidden]
    predictions = logits[hidden].float().log_softmax(dim=-1), log_profile[:, None].expand(*target.shape, -1)[hidden]
    right = [(scores.argmax(dim=-1) == truth).sum() for scores in predictions]
    nll = [F.nll_loss(scores, truth, reduction="sum") for scores in predictions]
    return torch.stack([*right, *nll, hidden.sum()]).double()

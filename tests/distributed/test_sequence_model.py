# SPDX-License-Identifier: Apache-2.0
"""The decoder on several ranks: the loss and every gradient are those of one rank."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from deepspeed_ds4sci.models import GenSLM, GenSLMConfig, shift_labels
from deepspeed_ds4sci.sequence.attention import SequenceParallelAttention
from deepspeed_ds4sci.sequence.layout import padded_length
from deepspeed_ds4sci.sequence.position_table import ShardedPositionEmbedding
from tests.distributed.sequence_run import results

LIMIT = 2e-6  # of the tensor's maximum, fp32
BATCH, LENGTH = 2, 29  # odd: padded for every group of more than one rank
MODES = {
    1: ["ulysses"],
    2: ["ulysses", "ring"],
    4: ["ulysses", "ring", {"ulysses": 2, "ring": 2}],
}
KINDS = {
    "rotary": dict(rotary_fraction=0.5),
    "learned": dict(
        position_embedding="learned", parallel_residual=False, activation="gelu_tanh", tie_embeddings=True
    ),
    "alibi": dict(position_embedding="alibi", num_heads=3, hidden_size=30),  # heads that no group divides
    "encoder": dict(rotary_fraction=0.5, causal=False, num_kv_heads=2),
}


def make_model(kind):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=40, max_positions=45)
    model = GenSLM(GenSLMConfig(**{**sizes, **KINDS[kind]}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_batch(kind, length):
    """Inputs of the whole sequence with its labels shifted (a decoder's) and padding as documents of id -1."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 69, (BATCH, LENGTH), generator=generator)
    documents = torch.zeros_like(ids)
    documents[1] = torch.arange(LENGTH) // 11
    labels = ids if KINDS[kind].get("causal", True) else ids.masked_fill(ids % 3 > 0, -100)
    ids, documents, labels = (
        F.pad(tensor, (0, length - LENGTH), value=value)
        for tensor, value in ((ids, 3), (documents, -1), (labels, -100))
    )
    return ids, documents, shift_labels(labels, documents) if KINDS[kind].get("causal", True) else labels


def one_rank(kind):
    """Loss, logits and gradients of the whole, unpadded."""
    model = make_model(kind)
    ids, documents, labels = make_batch(kind, LENGTH)
    output = model(ids, shift_labels=labels, document_ids=documents)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def share(error, of):
    return float(error.abs().max() / of.abs().max())


def compare(kind, mode, expected, expected_gradients, tile):
    """{tensor: error as a share of its maximum} on this rank."""
    attention = SequenceParallelAttention(dist.group.WORLD, mode)
    length = padded_length(LENGTH, attention.multiple)
    layout = attention.layout(length // attention.size)
    model = make_model(kind)
    model.attention = attention
    model.mlp_tile = model.loss_tile = tile
    if model.position_embedding is not None:
        table = ShardedPositionEmbedding.from_table(model.position_embedding.weight, dist.group.WORLD)
        model.position_embedding = table
    ids, documents, labels = (layout.shard(x, 1, attention.rank) for x in make_batch(kind, length))

    def mean_over_all_ranks(loss_sum, num_tokens):
        num_tokens = num_tokens.clone()
        dist.all_reduce(num_tokens)
        return loss_sum / num_tokens

    model.loss_reduction = mean_over_all_ranks
    output = model(ids, shift_labels=labels, document_ids=documents)
    output.loss.backward()
    loss = output.loss.detach().clone()
    dist.all_reduce(loss)
    errors = {"loss": share(loss - expected.loss, expected.loss)}
    real = layout.positions(attention.rank) < LENGTH
    hidden = expected.hidden_states[:, layout.positions(attention.rank)[real]]
    errors["hidden"] = share(output.hidden_states[:, real] - hidden, hidden)
    for name, parameter in model.named_parameters():
        want, gradient = expected_gradients[name], parameter.grad
        if name == "position_embedding.weight":
            errors[name] = share(gradient[: table.stop - table.start] - want[table.start : table.stop], want)
            continue
        dist.all_reduce(gradient)
        errors[name] = share(gradient - want, want)
    return errors


def labels_are_refused():
    model = make_model("rotary")
    model.attention = SequenceParallelAttention(dist.group.WORLD)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    try:
        model(ids, labels=ids)
    except ValueError as error:
        return str(error)


def checks():
    errors = {}
    for kind in KINDS:
        expected, gradients = one_rank(kind)
        for mode in MODES[dist.get_world_size()]:
            errors[kind, str(mode)] = compare(kind, mode, expected, gradients, 5 if mode == "ring" else None)
    return errors, labels_are_refused()


@pytest.mark.distributed(4)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loss_and_every_gradient_equal_one_ranks(world_size):
    for rank, result in enumerate(results(world_size)):
        errors, refusal = result["model"]
        assert len(errors) == len(KINDS) * len(MODES[world_size])
        for key, tensors in errors.items():
            for name, error in tensors.items():
                assert error <= LIMIT, f"rank {rank}, {key}, {name}: {error:.2e}"
        if world_size > 1:
            assert refusal == "labels must be shifted before the sequence is split over ranks: pass shift_labels"

# SPDX-License-Identifier: Apache-2.0
"""Tiled layers equal untiled ones: values, every gradient, dropout under recomputation, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deepspeed_ds4sci.sequence.tiling import cross_entropy_sum, tiled, tiled_cross_entropy


def make_mlp(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 6)).double()


def gradients(module, loss, *inputs):
    return torch.autograd.grad(loss, [*inputs, *module.parameters()])


@pytest.mark.parametrize("tile", [1, 3, 4, 11, 50])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_tiled_mlp_is_the_mlp(tile, dim):
    mlp, x = make_mlp(), torch.randn(11, 11, 6, dtype=torch.float64, requires_grad=True)
    out, expected = tiled(mlp, x, tile, dim), mlp(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(mlp, out.sin().sum(), x), gradients(mlp, expected.sin().sum(), x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_tiles_are_contiguous():
    seen = []
    x = torch.randn(2, 9, 6, requires_grad=True)
    tiled(lambda part: seen.append(part.is_contiguous()) or part.sin(), x, 2).sum().backward()
    assert len(seen) == 10 and all(seen)


@pytest.mark.parametrize("nested", [False, True])
def test_dropout_is_the_same_in_both_passes(nested):
    """With the masks of the forward pass, the gradient of a piecewise linear function is its slope along x."""
    mlp = nn.Sequential(nn.Linear(6, 24, bias=False), nn.Dropout(0.5), nn.Linear(24, 6, bias=False)).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)

    def run(x):
        return checkpoint(lambda y: tiled(mlp, y, 2), x, use_reentrant=False) if nested else tiled(mlp, x, 2)

    torch.manual_seed(5)
    out = run(x)
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close((dx * x).sum(), out.sum())  # linear once the masks are fixed
    torch.manual_seed(5)
    assert torch.equal(run(x), out)


def test_each_parameter_gets_its_gradient_once():
    mlp, x = make_mlp(), torch.randn(1, 12, 6, dtype=torch.float64)
    calls = []
    for name, parameter in mlp.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    tiled(mlp, x, 2).sum().backward()
    assert sorted(calls) == sorted(dict(mlp.named_parameters()))


@pytest.mark.parametrize("tile", [1, 4, 30, 100])
def test_tiled_cross_entropy_is_cross_entropy(tile):
    torch.manual_seed(1)
    head = nn.Linear(6, 17).double()
    hidden = torch.randn(2, 15, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(17, (2, 15))
    labels[0, 3:9] = -100
    labels[1] = labels[1].masked_fill(labels[1] > 12, -100)
    total, count = tiled_cross_entropy(hidden, head, labels, tile)
    expected = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")
    assert count == (labels != -100).sum() and total.dtype == torch.float64
    torch.testing.assert_close(total, expected)
    for got, want in zip(gradients(head, total, hidden), gradients(head, expected, hidden), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_nothing_labelled_gives_zero_and_no_nan():
    head, hidden = nn.Linear(4, 5), torch.randn(1, 7, 4, requires_grad=True)
    labels = torch.full((1, 7), -1)
    for total, count in (
        tiled_cross_entropy(hidden, head, labels, 3, ignore_index=-1),
        cross_entropy_sum(head(hidden), labels, ignore_index=-1),
    ):
        assert total == 0 and count == 0
        assert all((gradient == 0).all() for gradient in gradients(head, total, hidden))


def test_bf16_logits_are_summed_in_fp32():
    head, hidden = nn.Linear(4, 5).bfloat16(), torch.randn(1, 300, 4).bfloat16()
    labels = torch.randint(5, (1, 300))
    total, _ = tiled_cross_entropy(hidden, head, labels, 7)
    expected = F.cross_entropy(head(hidden)[0].float(), labels[0], reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected)


def test_logits_and_activations_exist_one_tile_at_a_time():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    head, hidden = nn.Linear(4, 100), torch.randn(1, 64, 4, requires_grad=True)
    with Largest() as largest:
        tiled_cross_entropy(hidden, head, torch.randint(100, (1, 64)), 8)[0].backward()
        mlp = nn.Sequential(nn.Linear(4, 100), nn.GELU(), nn.Linear(100, 4))
        tiled(mlp, hidden, 8).sum().backward()
    assert largest.elements == 8 * 100


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="tile must be at least 1 token, got 0"):
        tiled(nn.Identity(), torch.zeros(1, 3, 2), 0)
    with pytest.raises(ValueError, match=r"labels must be \[1, 3\] like hidden, got \[1, 4\]"):
        tiled_cross_entropy(torch.zeros(1, 3, 2), nn.Identity(), torch.zeros(1, 4), 2)

# SPDX-License-Identifier: Apache-2.0
"""Slopes and rotations against their papers' formulas in Python's own arithmetic."""

import cmath
import math

import pytest
import torch

from deepspeed_ds4sci.sequence.alibi import alibi_bias, alibi_slopes
from deepspeed_ds4sci.sequence.rotary import RotaryEmbedding, RotaryScaling, apply_rotary, rotary_frequencies


def test_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(16)[:2].tolist() == pytest.approx([2**-0.5, 0.5])
    twelve = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i / 2) for i in (1, 3, 5, 7)]
    assert alibi_slopes(12).tolist() == pytest.approx(twelve)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        alibi_slopes(0)


def test_bias_falls_with_distance_by_global_position():
    bias = alibi_bias(torch.tensor([0.5, 0.25]), torch.tensor([7, 100]), torch.tensor([7, 5, 110]))
    assert bias.tolist() == [[[0, -1, -51.5], [-46.5, -47.5, -5]], [[0, -0.5, -25.75], [-23.25, -23.75, -2.5]]]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(8, 8), (10, 4), (6, 2)])
def test_rotation_is_multiplication_by_a_complex_number(interleaved, head_dim, rotated):
    x = torch.randn(2, 3, 2, head_dim, dtype=torch.float64)
    positions = torch.tensor([[0, 5, 1000003], [7, 7, 2]])
    cos, sin = RotaryEmbedding(rotated)(positions, torch.float64)
    out = apply_rotary(x, cos, sin, interleaved)
    assert torch.equal(out[..., rotated:], x[..., rotated:])
    for b, t, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 2, rotated // 2))).tolist():
        real, imaginary = (2 * i, 2 * i + 1) if interleaved else (i, i + rotated // 2)
        angle = int(positions[b, t]) * 10000.0 ** (-2 * i / rotated)
        turned = complex(x[b, t, h, real], x[b, t, h, imaginary]) * cmath.exp(1j * angle)
        assert complex(out[b, t, h, real], out[b, t, h, imaginary]) == pytest.approx(turned, abs=1e-8)


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    rotary = RotaryEmbedding(8)

    def score(i, j):
        at_i, at_j = (rotary(torch.tensor([[p]]), torch.float64) for p in (i, j))
        return float((apply_rotary(q, *at_i) * apply_rotary(k, *at_j)).sum())

    assert score(9, 4) == pytest.approx(score(1_000_009, 1_000_004), abs=1e-8)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-4)


def test_angles_beyond_a_million_tokens_are_exact():
    positions = torch.tensor([3_000_001])
    cos, _ = RotaryEmbedding(64)(positions, torch.float32)
    exact = [math.cos(3_000_001 * 10000.0 ** (-2 * i / 64)) for i in range(32)]
    assert (cos[0].double() - torch.tensor(exact, dtype=torch.float64)).abs().max() < 1e-7
    in_fp32 = torch.cos(positions.float() * (10000.0 ** -(torch.arange(0, 64, 2).float() / 64)))
    assert (in_fp32.double() - torch.tensor(exact, dtype=torch.float64)).abs().max() > 1e-2  # why fp64


def test_casting_the_model_leaves_the_frequencies_alone():
    rotary = RotaryEmbedding(16).to(torch.bfloat16)
    assert rotary.frequencies.dtype == torch.float64
    cos, sin = rotary(torch.tensor([12345]), torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.bfloat16 and not rotary.state_dict()


def test_bf16_is_rotated_in_fp32_and_rounded_once():
    x = torch.randn(1, 5, 2, 8).bfloat16()
    cos, sin = RotaryEmbedding(8)(torch.arange(5)[None] + 1000, torch.float32)
    rotated = apply_rotary(x, cos, sin)
    assert rotated.dtype == torch.bfloat16 and torch.equal(rotated, apply_rotary(x.float(), cos, sin).bfloat16())


def test_linear_and_ntk_scaling():
    plain, _ = rotary_frequencies(16)
    linear, factor = rotary_frequencies(16, scaling=RotaryScaling("linear", 4.0))
    assert torch.equal(linear, plain / 4) and factor == 1
    ntk, factor = rotary_frequencies(16, scaling=RotaryScaling("ntk", 4.0))
    assert ntk[0] == plain[0] and float(ntk[-1]) == pytest.approx(float(plain[-1]) / 4) and factor == 1


def test_yarn_scaling_is_the_papers():
    dim, base, length, factor = 64, 10000.0, 2048, 8.0
    frequencies, attention_factor = rotary_frequencies(dim, base, RotaryScaling("yarn", factor, length))
    assert attention_factor == pytest.approx(0.1 * math.log(factor) + 1)

    def bound(turns):
        return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    low, high = math.floor(bound(32)), math.ceil(bound(1))
    for i in range(dim // 2):
        plain = base ** (-2 * i / dim)
        ramp = min(max((i - low) / (high - low), 0), 1)
        assert float(frequencies[i]) == pytest.approx(plain * (1 - ramp) + plain / factor * ramp, rel=1e-12)
    cos, _ = RotaryEmbedding(dim, base, RotaryScaling("yarn", factor, length))(torch.tensor([0]), torch.float64)
    assert cos.unique().tolist() == [pytest.approx(attention_factor)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RotaryScaling("dynamic", 2.0), "kind must be .* got 'dynamic'"),
        (lambda: RotaryScaling("linear", 0.5), "factor must be at least 1, got 0.5"),
        (lambda: RotaryScaling("linear", float("nan")), "factor must be at least 1, got nan"),
        (lambda: RotaryScaling("yarn", 2.0), "original_length must be given in tokens for yarn, got None"),
        (lambda: RotaryScaling("yarn", 2.0, 64, 1.0, 2.0), "beta_fast must be above beta_slow"),
        (lambda: RotaryEmbedding(7), "must be even and at least 2, got 7"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()

# SPDX-License-Identifier: Apache-2.0
"""What a mask drops never influences what it keeps, in values and gradients."""

import pytest
import torch

from tests.unit.nn.helpers import make_inputs, make_stack


def padded_masks(n_seq, n_res, keep_seq, keep_res):
    sequences, residues = torch.arange(n_seq) < keep_seq, torch.arange(n_res) < keep_res
    return sequences[:, None] & residues, residues[:, None] & residues


@pytest.mark.parametrize("garbage", [0.0, 1.0, 1e3])
def test_padding_equals_cropping(garbage):
    stack = make_stack().eval()
    m, z, _, _ = make_inputs(n_seq=6, n_res=8)
    msa_mask, pair_mask = padded_masks(6, 8, keep_seq=4, keep_res=5)
    want = stack(m[:4, :5], z[:5, :5])
    m = torch.where(msa_mask[..., None], m, garbage * torch.randn_like(m))
    z = torch.where(pair_mask[..., None], z, garbage * torch.randn_like(z))
    got = stack(m, z, msa_mask, pair_mask)
    for a, b in zip((got[0][:4, :5], got[1][:5, :5], got[2][:5]), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert all(torch.isfinite(x).all() for x in got)


def test_padding_gets_no_gradient_from_what_is_kept():
    stack = make_stack().eval()
    m, z, _, _ = make_inputs(n_seq=6, n_res=8)
    msa_mask, pair_mask = padded_masks(6, 8, keep_seq=4, keep_res=5)
    m.requires_grad_(), z.requires_grad_()
    got = stack(m, z, msa_mask, pair_mask)
    (got[0][:4, :5].square().sum() + got[1][:5, :5].square().sum()).backward()
    assert (m.grad[~msa_mask] == 0).all() and (z.grad[~pair_mask] == 0).all()
    assert (m.grad[msa_mask] != 0).any() and (z.grad[pair_mask] != 0).any()


def test_a_fully_masked_alignment_gives_no_nan():
    stack = make_stack()
    m, z, _, _ = make_inputs()
    m.requires_grad_()
    got = stack(m, z, torch.zeros(m.shape[:-1]), torch.zeros(z.shape[:-1]))
    sum(x.sum() for x in got).backward()
    assert all(torch.isfinite(x).all() for x in (*got, m.grad))

# SPDX-License-Identifier: Apache-2.0
"""Small modules with every parameter random, and inputs for them."""

import torch
from torch import nn

from deepspeed_ds4sci.nn import EvoformerBlock, EvoformerStack

C_M, C_Z, HEADS_MSA, HEADS_PAIR = 12, 8, 3, 2
SIZES = dict(
    c_hidden_msa_att=4,
    c_hidden_opm=5,
    c_hidden_mul=6,
    c_hidden_pair_att=3,
    num_heads_msa=HEADS_MSA,
    num_heads_pair=HEADS_PAIR,
    transition_n=2,
)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, so that nothing is hidden behind a weight that starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.4 * noise)
    return module


def make_block(dtype=torch.float64, **options) -> EvoformerBlock:
    return randomise(EvoformerBlock(C_M, C_Z, **{**SIZES, "implementation": "tiled", **options}).to(dtype))


def make_stack(num_blocks: int = 2, dtype=torch.float64, **options) -> EvoformerStack:
    options = {**SIZES, "implementation": "tiled", "c_s": 7, **options}
    return randomise(EvoformerStack(num_blocks, C_M, C_Z, **options).to(dtype))


def make_inputs(n_seq: int = 4, n_res: int = 5, *, batch=(), dtype=torch.float64, seed: int = 1):
    """(m, z, msa_mask, pair_mask); about a fifth is masked, but never a whole row or column."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(*batch, n_seq, n_res, C_M, generator=generator, dtype=torch.float64)
    z = torch.randn(*batch, n_res, n_res, C_Z, generator=generator, dtype=torch.float64)
    msa_mask = torch.rand(*batch, n_seq, n_res, generator=generator) > 0.2
    pair_mask = torch.rand(*batch, n_res, n_res, generator=generator) > 0.2
    msa_mask[..., 0, :] = msa_mask[..., :, 0] = True
    pair_mask[..., 0, :] = pair_mask[..., :, 0] = True
    return m.to(dtype), z.to(dtype), msa_mask.to(dtype), pair_mask.to(dtype)

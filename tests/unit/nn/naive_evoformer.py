# SPDX-License-Identifier: Apache-2.0
"""The Evoformer's algorithms written down line by line from the supplement, one batch element, no masks but keep = 1.

Every function takes the parameters as a dict with the names of `state_dict()`; everything is materialised.
Source: Jumper et al. 2021, Supplementary Algorithms 7 to 15.
"""

import math

import torch
from torch.nn.functional import layer_norm


def sub(params: dict, prefix: str) -> dict:
    return {name[len(prefix) + 1 :]: value for name, value in params.items() if name.startswith(prefix + ".")}


def linear(params: dict, name: str, x):
    y = torch.einsum("...i,oi->...o", x, params[f"{name}.weight"])
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def norm(params: dict, name: str, x):
    return layer_norm(x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"])


def attention_over_last(params: dict, x, mask, bias, heads: int):
    """x [R, C, c] attends over C within each r; bias [C query, C key, H] or None; mask [R, C]."""
    rows, columns, _ = x.shape
    q, k, v, g = (linear(params, f"mha.linear_{n}", x).reshape(rows, columns, heads, -1) for n in "qkvg")
    out = torch.zeros_like(q)
    for r in range(rows):
        for h in range(heads):
            logits = q[r, :, h] @ k[r, :, h].T / math.sqrt(q.shape[-1])
            if bias is not None:
                logits = logits + bias[:, :, h]
            keep = mask[r].bool()
            weights = torch.softmax(logits[:, keep], dim=-1)
            out[r, :, h] = torch.sigmoid(g[r, :, h]) * (weights @ v[r, keep, h])
    return linear(params, "mha.linear_o", out.reshape(rows, columns, -1))


def msa_row_attention(params, m, z, mask, heads):  # Algorithm 7
    bias = linear(params, "linear_z", norm(params, "layer_norm_z", z))
    return attention_over_last(params, norm(params, "layer_norm_m", m), mask, bias, heads)


def msa_column_attention(params, m, mask, heads):  # Algorithm 8
    params = sub(params, "_msa_att")
    m = norm(params, "layer_norm_m", m).transpose(0, 1)
    return attention_over_last(params, m, mask.T, None, heads).transpose(0, 1)


def transition(params, x, mask):  # Algorithms 9, 15
    hidden = torch.relu(linear(params, "linear_1", norm(params, "layer_norm", x)))
    return linear(params, "linear_2", hidden) * mask[..., None]


def outer_product_mean(params, m, mask, eps=1e-3):  # Algorithm 10
    m = norm(params, "layer_norm", m)
    a, b = linear(params, "linear_1", m), linear(params, "linear_2", m)
    n_seq, n_res, _ = m.shape
    rows = []
    for i in range(n_res):
        for j in range(n_res):
            total, count = 0.0, 0.0
            for s in range(n_seq):
                weight = mask[s, i] * mask[s, j]
                total = total + weight * torch.outer(a[s, i], b[s, j])
                count = count + weight
            rows.append(linear(params, "linear_out", total.reshape(-1)) / (eps + count))
    return torch.stack(rows).reshape(n_res, n_res, -1)


def triangle_multiplication(params, z, mask, outgoing):  # Algorithms 11, 12
    z = norm(params, "layer_norm_in", z)
    a, b = (
        mask[..., None] * torch.sigmoid(linear(params, f"linear_{n}_g", z)) * linear(params, f"linear_{n}_p", z)
        for n in "ab"
    )
    n_res = z.shape[0]
    product = torch.zeros_like(a)
    for i in range(n_res):
        for j in range(n_res):
            for k in range(n_res):
                product[i, j] += a[i, k] * b[j, k] if outgoing else a[k, i] * b[k, j]
    return torch.sigmoid(linear(params, "linear_g", z)) * linear(
        params, "linear_z", norm(params, "layer_norm_out", product)
    )


def triangle_attention(params, z, mask, heads, starting):  # Algorithms 13, 14
    n_res = z.shape[0]
    z = norm(params, "layer_norm", z)
    b = linear(params, "linear", z)
    q, k, v, g = (linear(params, f"mha.linear_{n}", z).reshape(n_res, n_res, heads, -1) for n in "qkvg")
    out = torch.zeros_like(q)
    for i in range(n_res):
        for j in range(n_res):
            for h in range(heads):
                if starting:  # edge ij looks at the edges ik, bias from jk
                    keep = mask[i].bool()
                    logits = k[i, keep, h] @ q[i, j, h] / math.sqrt(q.shape[-1]) + b[j, keep, h]
                    values = v[i, keep, h]
                else:  # edge ij looks at the edges kj, bias from ki
                    keep = mask[:, j].bool()
                    logits = k[keep, j, h] @ q[i, j, h] / math.sqrt(q.shape[-1]) + b[keep, i, h]
                    values = v[keep, j, h]
                out[i, j, h] = torch.sigmoid(g[i, j, h]) * (torch.softmax(logits, 0) @ values)
    return linear(params, "mha.linear_o", out.reshape(n_res, n_res, -1))


def pair_stack(params, z, mask, heads):  # Algorithm 6, lines 6 to 10
    z = z + triangle_multiplication(sub(params, "tri_mul_out"), z, mask, outgoing=True)
    z = z + triangle_multiplication(sub(params, "tri_mul_in"), z, mask, outgoing=False)
    z = z + triangle_attention(sub(params, "tri_att_start"), z, mask, heads, starting=True)
    z = z + triangle_attention(sub(params, "tri_att_end"), z, mask, heads, starting=False)
    return z + transition(sub(params, "pair_transition"), z, mask)


def evoformer_block(params, m, z, msa_mask, pair_mask, heads_msa, heads_pair, opm_first=False):  # Algorithm 6
    opm = sub(params, "outer_product_mean")
    if opm_first:
        z = z + outer_product_mean(opm, m, msa_mask)
    m = m + msa_row_attention(sub(params, "msa_att_row"), m, z, msa_mask, heads_msa)
    m = m + msa_column_attention(sub(params, "msa_att_col"), m, msa_mask, heads_msa)
    m = m + transition(sub(params, "msa_transition"), m, msa_mask)
    if not opm_first:
        z = z + outer_product_mean(opm, m, msa_mask)
    return m, pair_stack(sub(params, "pair_stack"), z, pair_mask, heads_pair)

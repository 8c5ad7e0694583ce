# SPDX-License-Identifier: Apache-2.0
"""Which kernels compute d(pair_bias) on Hopper and in how many shares: the host code itself, compiled without CUDA."""

import ctypes
import os
import subprocess

import pytest

from .build import EMULATOR, FLAGS, SOURCES

SHIM = """
#include "sm90/dpair_plan.h"
extern "C" int plan(int groups, int rows, int q_len, int k_len, int heads, int head_dim, int wants_dq, int num_sms) {
    ds4sci::KernelParams p{};
    p.num_groups = groups;
    p.rows_per_group = rows;
    p.q_len = q_len;
    p.k_len = k_len;
    p.heads = heads;
    p.head_dim = head_dim;
    p.dq = wants_dq ? &p : nullptr;
    const auto plan = ds4sci::DpairPlan::of(p, num_sms);
    return plan.with_dq ? -plan.splits : plan.splits;
}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """(groups, rows, queries, keys, heads, head dim) -> whether with dQ, shares."""
    folder = tmp_path_factory.mktemp("plan")
    source, library = folder / "plan.cpp", folder / "plan.so"
    source.write_text(SHIM)
    command = [os.environ.get("CXX", "g++"), *FLAGS, f"-I{SOURCES}", f"-I{EMULATOR}", "-shared", source, "-o", library]
    subprocess.run(command, check=True)
    function = ctypes.CDLL(str(library)).plan

    def call(groups, rows, q_len, k_len, heads, head_dim, wants_dq=True, num_sms=132):
        signed = function(groups, rows, q_len, k_len, heads, head_dim, int(wants_dq), num_sms)
        return signed < 0, abs(signed)

    return call


@pytest.mark.parametrize(
    ("problem", "with_dq", "splits"),
    [
        ((1, 256, 256, 256, 4, 32), True, 8),  # 64 of 66 pairs
        ((1, 512, 512, 512, 4, 32), True, 7),  # 112 of 4 times 30 clusters of 4
        ((1, 512, 384, 384, 8, 32), True, 3),
        ((1, 5120, 384, 384, 8, 8), True, 3),
        ((1, 768, 768, 768, 4, 32), True, 2),
        ((1, 768, 768, 768, 32, 32), True, 1),
        ((1, 768, 768, 768, 8, 32), True, 1),
        ((1, 1024, 1024, 1024, 4, 32), False, 1),  # clusters of 8
        ((1, 640, 640, 640, 4, 32), False, 5),  # of 5, of which few fit
        ((1, 128, 128, 128, 4, 32), False, 30),  # no cluster
        ((1, 512, 512, 512, 4, 64), False, 2),
        ((1, 3, 256, 256, 4, 32), False, 3),  # a third of the multiprocessors
    ],
)
def test_plans_of_known_shapes(plan, problem, with_dq, splits):
    assert plan(*problem) == (with_dq, splits)


def test_what_rules_the_common_kernel_out(plan):
    problem = (1, 512, 512, 512, 4, 32)
    assert plan(*problem)[0]
    assert not plan(*problem, wants_dq=False)[0]
    assert not plan(*problem, num_sms=66)[0]  # half a GPU


@pytest.mark.parametrize("q_len", (1, 128, 500, 1200))
@pytest.mark.parametrize("k_len", (1, 200, 385, 512, 769, 1024, 3000))
@pytest.mark.parametrize("heads", (1, 4, 16))
def test_shares_have_rows_and_fit(plan, heads, k_len, q_len):
    for groups, rows in ((1, 1), (1, 7), (2, 300), (1, 5000)):
        _, splits = plan(groups, rows, q_len, k_len, heads, 32)
        assert 1 <= splits <= min(rows, 32)
        assert splits == 1 or splits * groups * heads * q_len * k_len * 4 <= 64 << 20

# SPDX-License-Identifier: Apache-2.0
"""Which kernels a call takes on Hopper and how they share the work: the host code itself, without CUDA."""

import ctypes
import os
import subprocess

import pytest

from .build import EMULATOR, FLAGS, SOURCES

SHIM = """
#include "sm90/plan.h"
static ds4sci::KernelParams problem(int groups, int rows, int q_len, int k_len, int heads, int head_dim) {
    ds4sci::KernelParams p{};
    p.num_groups = groups;
    p.rows_per_group = rows;
    p.q_len = q_len;
    p.k_len = k_len;
    p.heads = heads;
    p.head_dim = head_dim;
    return p;
}
extern "C" int two_rows(int head_dim, int rows) { return ds4sci::takes_two_rows(head_dim, rows); }
extern "C" int shares(int groups, int rows, int q_len, int k_len, int heads, int head_dim, int num_sms) {
    return ds4sci::dpair_shares(problem(groups, rows, q_len, k_len, heads, head_dim), num_sms);
}
extern "C" int factors(int groups, int rows, int q_len, int k_len, int heads, int head_dim) {
    return ds4sci::factors_dpair(problem(groups, rows, q_len, k_len, heads, head_dim));
}
extern "C" long long dpair_blocks(int groups, int rows, int q_len, int k_len, int heads, int shares) {
    ds4sci::KernelParams p = problem(groups, rows, q_len, k_len, heads, 32);
    p.dpair_splits = shares;
    return ds4sci::num_dpair_blocks(p);
}
extern "C" int dqkv(int groups, int rows, int q_len, int k_len, int heads, int head_dim, int num_sms, int wants_dq,
                    int wants_dk) {
    ds4sci::KernelParams p = problem(groups, rows, q_len, k_len, heads, head_dim);
    p.dq = wants_dq ? &p : nullptr;
    p.dk = wants_dk ? &p : nullptr;
    return ds4sci::takes_dqkv(p, num_sms) ? ds4sci::dqkv_warpgroups(head_dim, k_len) : 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    source, library = folder / "plan.cpp", folder / "plan.so"
    source.write_text(SHIM)
    command = [os.environ.get("CXX", "g++"), *FLAGS, f"-I{SOURCES}", f"-I{EMULATOR}", "-shared", source, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def test_blocks_of_four_rows_where_few_of_them_are_missing(library):
    taken = [rows for rows in range(1, 41) if library.two_rows(32, rows)]
    assert taken == [4, 7, 8, 10, 11, 12, 16, 19, 20, 22, 23, 24, 28, 31, 32, *range(34, 41)]
    assert all(library.two_rows(8, rows) for rows in (*range(94, 5121), 2**31 - 1))
    assert not library.two_rows(40, 512)  # registers


@pytest.mark.parametrize(
    ("problem", "warpgroups"),  # groups, rows, queries, keys, heads, head dim; 0: two kernels
    [
        ((1, 256, 256, 256, 4, 32), 4),
        ((1, 512, 384, 384, 8, 32), 3),  # 6 tiles of keys
        ((1, 512, 512, 512, 4, 32), 4),
        ((1, 5120, 384, 384, 8, 8), 3),
        ((1, 1024, 1024, 1024, 4, 32), 4),
        ((1, 768, 768, 768, 4, 64), 3),
        ((1, 512, 512, 512, 4, 64), 3),  # more do not fit the registers
        ((48, 1, 768, 768, 16, 48), 3),
        ((1, 512, 512, 64, 4, 32), 0),  # two of three warpgroups without keys
        ((1, 512, 512, 1, 4, 32), 0),
        ((1, 16, 1024, 1024, 4, 32), 0),  # 64 items
        ((1, 35, 1024, 1024, 4, 32), 0),  # 140: a block each, and 8 more
        ((1, 33, 1024, 1024, 4, 32), 4),
    ],
)
def test_one_kernel_for_dq_dk_and_dv(library, problem, warpgroups):
    assert library.dqkv(*problem, 132, 1, 1) == warpgroups


def test_one_kernel_only_for_all_of_its_results(library):
    problem = (1, 512, 512, 512, 4, 32)
    assert library.dqkv(*problem, 132, 1, 1)
    assert not library.dqkv(*problem, 132, 1, 0)
    assert not library.dqkv(*problem, 132, 0, 1)
    assert not library.dqkv(*problem, 0, 1, 1)  # they could not be counted


@pytest.mark.parametrize(
    ("problem", "shares"),
    [
        ((1, 256, 256, 256, 4, 32), 8),  # 128 of 132 multiprocessors
        ((1, 512, 512, 512, 4, 32), 2),
        ((1, 512, 384, 384, 8, 32), 5),  # 360 of 396
        ((1, 1024, 1024, 1024, 4, 32), 1),
        ((1, 640, 640, 640, 4, 32), 5),
        ((48, 1, 768, 768, 16, 48), 1),  # no more than rows
        ((1, 3, 256, 256, 4, 32), 3),  # a third of the multiprocessors
    ],
)
def test_shares_of_known_shapes(library, problem, shares):
    assert library.shares(*problem, 132) == shares


@pytest.mark.parametrize("q_len", (1, 128, 500, 1200))
@pytest.mark.parametrize("k_len", (1, 200, 385, 512, 769, 1024, 3000))
@pytest.mark.parametrize("heads", (1, 4, 16))
def test_shares_have_rows_and_fit(library, heads, k_len, q_len):
    for groups, rows in ((1, 1), (1, 7), (2, 300), (1, 5000)):
        shares = library.shares(groups, rows, q_len, k_len, heads, 32, 132)
        assert 1 <= shares <= min(rows, 32)
        assert shares == 1 or shares * groups * heads * q_len * k_len * 4 <= 64 << 20


@pytest.mark.parametrize(
    ("problem", "factored"),
    [
        ((1, 256, 256, 256, 4, 32), False),  # one more launch would cost 1.5 %
        ((1, 512, 256, 256, 4, 32), True),
        ((1, 511, 256, 256, 4, 32), False),
        ((1, 512, 512, 512, 4, 32), True),
        ((1, 512, 512, 512, 4, 17), True),  # as if of 32
        ((1, 5120, 384, 384, 8, 16), False),
        ((48, 1, 768, 768, 16, 48), True),
        ((1, 2**20, 1024, 1024, 64, 64), True),  # beyond 32 bits
    ],
)
def test_factored_sums_where_there_is_enough_work(library, problem, factored):
    assert library.factors(*problem) == factored


def test_blocks_of_dpair(library):
    library.dpair_blocks.restype = ctypes.c_longlong
    assert library.dpair_blocks(1, 256, 256, 256, 4, 8) == 128
    assert library.dpair_blocks(2, 300, 129, 1, 3, 5) == 60

// SPDX-License-Identifier: Apache-2.0
// Which kernels a call takes on Hopper, and how they share the work.
#pragma once
#include "kernel_params.h"

namespace ds4sci {

// Whether the forward with a pair bias takes blocks of four rows, two to a warpgroup, in place of three: they were 2
// to 5 % faster where both are full, and not where more rows are missing from their last block.
constexpr bool takes_two_rows(int head_dim, int rows_per_group) {
    if (head_dim > 32) return false;  // registers
    return ceil_div<int64_t>(rows_per_group, 4) * 4 * 100 <= ceil_div<int64_t>(rows_per_group, 3) * 3 * 103;
}

// Warpgroups with 64 keys each of the kernel that computes dQ, dK and dV at once: of three or four the number that
// leaves fewer of them without keys, four if that is the same.
constexpr int dqkv_warpgroups(int head_dim, int k_len) {
    if (head_dim > 32) return 3;  // registers
    const int tiles = ceil_div(k_len, 64);
    return ceil_div(tiles, 3) * 3 < ceil_div(tiles, 4) * 4 ? 3 : 4;
}

// Whether dQ, dK and dV come from one kernel, which saves a quarter of the time of two: its work items are the rows of
// each head, and its warpgroups have all keys of one. Not where few of either leave much of the GPU idle.
inline bool takes_dqkv(const KernelParams& p, int32_t num_sms) {
    if (p.dq == nullptr || p.dk == nullptr || num_sms < 1) return false;
    const int64_t items = static_cast<int64_t>(p.rows_per_group) * p.heads * p.num_groups;
    const int64_t places = ceil_div<int64_t>(items, num_sms) * num_sms;
    const int warpgroups = dqkv_warpgroups(p.head_dim, p.k_len), tiles = ceil_div(p.k_len, 64);
    const double use =
        static_cast<double>(items) / static_cast<double>(places) * tiles / (ceil_div(tiles, warpgroups) * warpgroups);
    return use >= 0.7;
}

// Positions of a block of d(pair_bias), on either side.
constexpr int kDpairPositions = 128;

// Blocks that compute d(pair_bias).
inline int64_t num_dpair_blocks(const KernelParams& p) {
    return static_cast<int64_t>(ceil_div(p.q_len, kDpairPositions)) * ceil_div(p.k_len, kDpairPositions) * p.heads *
           p.num_groups * p.dpair_splits;
}

// The smallest padded head dim at which sums of d(pair_bias) are ever factored; below it they were slower.
constexpr int kFactoredHeadDim = 32;

// Whether d(pair_bias) comes from factored sums (bwd_dpair_kernel.cuh). They made the backward pass of 512 x 512 1.7 %
// faster, at head dim 64 5 %; one more launch follows, of 2 us.
inline bool factors_dpair(const KernelParams& p) {
    const int64_t logits = static_cast<int64_t>(p.num_groups) * p.rows_per_group * p.heads * p.q_len * p.k_len;
    return p.head_dim > kFactoredHeadDim / 2 && logits >= static_cast<int64_t>(1) << 27;
}

// Shares of the rows that d(pair_bias) is computed in: the fewest that keep nine tenths of the multiprocessors busy,
// else those that keep the most; each costs an fp32 copy of the gradient, so at most 64 MiB of them.
inline int32_t dpair_shares(const KernelParams& p, int32_t num_sms) {
    constexpr int64_t kMaxCopyBytes = static_cast<int64_t>(64) << 20;
    const int64_t units = static_cast<int64_t>(ceil_div(p.q_len, kDpairPositions)) *
                          ceil_div(p.k_len, kDpairPositions) * p.heads * p.num_groups;
    const int64_t copy_bytes = dpair_elements(p) * 4;
    int32_t best = 1;
    double best_use = 0.;
    for (int32_t shares = 1; shares <= 32 && shares <= p.rows_per_group; ++shares) {
        if (shares > 1 && shares * copy_bytes > kMaxCopyBytes) break;
        const int64_t waves = ceil_div<int64_t>(units * shares, num_sms);
        const double use = static_cast<double>(units * shares) / static_cast<double>(waves * num_sms);
        if (use > best_use) {
            best = shares;
            best_use = use;
        }
        if (best_use >= 0.9) break;
    }
    return best;
}

}  // namespace ds4sci

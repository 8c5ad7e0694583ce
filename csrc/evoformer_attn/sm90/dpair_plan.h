// SPDX-License-Identifier: Apache-2.0
// How d(pair_bias) is computed on Hopper: with dQ in one kernel, or apart; and in how many shares of the rows.
#pragma once
#include "kernel_params.h"

namespace ds4sci {

// Blocks that share the queries of the kernel that computes dQ and d(pair_bias) at once, 128 keys each. 0: it is not
// for so few or so many keys, or for a number of blocks of which few clusters fit the multiprocessors.
constexpr int dq_dpair_cluster(int k_len) {
    const int tiles = (k_len + 127) / 128;
    return tiles == 2 || tiles == 3 || tiles == 4 || tiles == 6 ? tiles : 0;
}

struct DpairPlan {
    bool with_dq;
    int32_t splits;

    static DpairPlan of(const KernelParams& p, int32_t num_sms) {
        const int q_tiles = ceil_div(p.q_len, 128), k_tiles = ceil_div(p.k_len, 128);
        const int64_t units = static_cast<int64_t>(q_tiles) * p.heads * p.num_groups;
        double use = 0.;
        const int cluster = dq_dpair_cluster(p.k_len);
        const bool fits = p.head_dim <= 32 && static_cast<int64_t>(p.heads) * p.head_dim < kMaxPositionElements;
        if (p.dq != nullptr && fits && cluster != 0 && num_sms >= kWholeGpu) {
            const int32_t splits = fewest_splits(p, units, clusters_at_once(cluster, num_sms), &use);
            // One kernel saves about a tenth of the two, and loses that where many multiprocessors have no work. Nor
            // is it worth several copies of a large gradient.
            const bool copies_are_small = splits == 1 || dpair_elements(p) * 4 < kMaxCopyBytes / 4;
            if (copies_are_small && use >= 0.85) return {true, splits};
        }
        const int32_t splits = fewest_splits(p, units * k_tiles, num_sms, &use);
        return {false, splits};
    }

  private:
    static constexpr int64_t kMaxPositionElements = 1 << 24;  // offsets within 128 queries are 32-bit
    static constexpr int32_t kWholeGpu = 100;  // multiprocessors; a slice (MIG) may have no room for a cluster
    static constexpr int64_t kMaxCopyBytes = static_cast<int64_t>(64) << 20;

    // How many clusters of so many blocks run at once. A cluster is within one of the groups that multiprocessors come
    // in, which are not of one size: counted by cudaOccupancyMaxActiveClusters on an H100 with 132 of them.
    static int32_t clusters_at_once(int32_t cluster, int32_t num_sms) {
        const int32_t of_132 = cluster == 2 ? 66 : cluster == 3 ? 39 : cluster == 4 ? 30 : 17;
        return of_132 * num_sms / 132;
    }

    // The fewest shares that keep nine tenths of the places for blocks or clusters busy, else those that keep the
    // most; each costs an fp32 copy of the gradient, so at most 64 MiB of them.
    static int32_t fewest_splits(const KernelParams& p, int64_t units, int32_t places, double* best_use) {
        const int64_t copy_bytes = dpair_elements(p) * 4;
        int32_t best = 1;
        *best_use = 0.;
        for (int32_t splits = 1; splits <= 32 && splits <= p.rows_per_group; ++splits) {
            if (splits > 1 && splits * copy_bytes > kMaxCopyBytes) break;
            const int64_t waves = ceil_div<int64_t>(units * splits, places);
            const double use = static_cast<double>(units * splits) / static_cast<double>(waves * places);
            if (use > *best_use) {
                best = splits;
                *best_use = use;
            }
            if (*best_use >= 0.9) break;
        }
        return best;
    }
};

}  // namespace ds4sci

// SPDX-License-Identifier: Apache-2.0
// Grids of the Hopper kernels, one function per kernel.
#pragma once
#include "sm90/bwd_dkv_kernel.cuh"
#include "sm90/bwd_dpair_kernel.cuh"
#include "sm90/bwd_dq_kernel.cuh"
#include "sm90/bwd_dqkv_kernel.cuh"
#include "sm90/fwd_kernel.cuh"
#include "sm90/fwd_two_row_kernel.cuh"
#include "sm90/launch.h"
#include "sm90/plan.h"
#include "sm90/prepare_kernel.cuh"

namespace ds4sci {

// One block per multiprocessor; each takes every n-th work item.
template <typename Tile, typename... Arguments>
cudaError_t launch_persistent(void (*kernel)(Sm90Params, Arguments...), int64_t num_items, const Sm90Params& p,
                              Arguments... arguments) {
    int num_sms = 0;
    const cudaError_t status = count_multiprocessors(&num_sms);
    if (status != cudaSuccess) return status;
    // The last item of a block and two steps further.
    if (num_items > 2147483647 - 2 * num_sms) return cudaErrorInvalidConfiguration;
    Sm90Params counted = p;
    counted.num_items = static_cast<int32_t>(num_items);
    return launch_overlapping(kernel, {num_items < num_sms ? num_items : num_sms, Tile::kThreads, Tile::kSmemBytes},
                              p.stream, counted, arguments...);
}

template <typename Tile>
int64_t num_position_items(const KernelParams& p, int length) {
    return static_cast<int64_t>(ceil_div(length, Tile::kPositions)) * ceil_div(p.rows_per_group, Tile::kRows) *
           p.heads * p.num_groups;
}

template <typename T>
cudaError_t run_sm90_prepare(const Sm90Params& p) {
    const Sm90PrepareBlocks blocks = Sm90PrepareBlocks::of(p);
    return launch_overlapping(blocks.vectors > 0 ? &sm90_prepare_kernel<T, true> : &sm90_prepare_kernel<T, false>,
                              {blocks.pair + blocks.key + blocks.vectors + blocks.marks, kPrepareThreads, 0}, p.stream,
                              p);
}

template <typename T, int kHeadDim, bool kPair>
cudaError_t launch_sm90_fwd(const Sm90Params& p) {
    using Tile = Sm90FwdTile<kHeadDim, kPair>;
    static_assert(Tile::kRows == sm90_rows_per_block(kHeadDim), "work items are counted before they are run");
    const auto launch_static = [&] {
        if constexpr (kPair && kHeadDim <= 32) {
            using TwoRows = Sm90FwdTwoRowTile<kHeadDim>;
            if (takes_two_rows(kHeadDim, p.rows_per_group))
                return launch_persistent<TwoRows>(&evoformer_sm90_fwd_two_row_kernel<T, kHeadDim>,
                                                  num_position_items<TwoRows>(p, p.q_len), p);
        }
        return launch_persistent<Tile>(&evoformer_sm90_fwd_kernel<T, kHeadDim, kPair, false>, p.num_items, p, false);
    };
    const cudaError_t status = launch_static();
    if (status != cudaSuccess) return status;
    return launch_persistent<Tile>(&evoformer_sm90_fwd_kernel<T, kHeadDim, kPair, true>, p.num_items, p, true);
}
template <typename T, int kHeadDim>
cudaError_t run_sm90_fwd(const Sm90Params& p) {
    return p.pair_bias != nullptr ? launch_sm90_fwd<T, kHeadDim, true>(p) : launch_sm90_fwd<T, kHeadDim, false>(p);
}

template <typename T, int kHeadDim, bool kPair>
cudaError_t launch_sm90_bwd_dq(const Sm90Params& p) {
    using Tile = Sm90BwdDqTile<kHeadDim, kPair>;
    return launch_persistent<Tile>(&evoformer_sm90_bwd_dq_kernel<T, kHeadDim, kPair>,
                                   num_position_items<Tile>(p, p.q_len), p);
}
template <typename T, int kHeadDim>
cudaError_t run_sm90_bwd_dq(const Sm90Params& p) {
    return p.pair_bias != nullptr ? launch_sm90_bwd_dq<T, kHeadDim, true>(p)
                                  : launch_sm90_bwd_dq<T, kHeadDim, false>(p);
}

template <typename T, int kHeadDim, bool kPair>
cudaError_t launch_sm90_bwd_dkv(const Sm90Params& p) {
    using Tile = Sm90BwdDkvTile<kHeadDim, kPair>;
    const int64_t num_items = static_cast<int64_t>(ceil_div(p.k_len, KeyBlock<kHeadDim>::kPositions)) *
                              ceil_div(p.rows_per_group, KeyBlock<kHeadDim>::kRows) * p.heads * p.num_groups;
    return launch_persistent<Tile>(&evoformer_sm90_bwd_dkv_kernel<T, kHeadDim, kPair>, num_items, p);
}
template <typename T, int kHeadDim>
cudaError_t run_sm90_bwd_dkv(const Sm90Params& p) {
    return p.pair_bias != nullptr ? launch_sm90_bwd_dkv<T, kHeadDim, true>(p)
                                  : launch_sm90_bwd_dkv<T, kHeadDim, false>(p);
}

template <typename T, int kHeadDim, int kConsumers, bool kPair>
cudaError_t launch_sm90_bwd_dqkv(const Sm90Params& p) {
    using Tile = Sm90BwdDqkvTile<kHeadDim, kConsumers, kPair>;
    const int64_t num_items = static_cast<int64_t>(p.rows_per_group) * p.heads * p.num_groups;
    return launch_persistent<Tile>(&evoformer_sm90_bwd_dqkv_kernel<T, kHeadDim, kConsumers, kPair>, num_items, p);
}
template <typename T, int kHeadDim>
cudaError_t run_sm90_bwd_dqkv(const Sm90Params& p) {
    if constexpr (kHeadDim <= 32) {
        if (dqkv_warpgroups(kHeadDim, p.k_len) == 4)
            return p.pair_bias != nullptr ? launch_sm90_bwd_dqkv<T, kHeadDim, 4, true>(p)
                                          : launch_sm90_bwd_dqkv<T, kHeadDim, 4, false>(p);
    }
    return p.pair_bias != nullptr ? launch_sm90_bwd_dqkv<T, kHeadDim, 3, true>(p)
                                  : launch_sm90_bwd_dqkv<T, kHeadDim, 3, false>(p);
}

template <typename T, int kHeadDim, bool kFactored>
cudaError_t launch_sm90_bwd_dpair(const Sm90Params& p) {
    using Tile = Sm90BwdDpairTile<kHeadDim>;
    return launch_overlapping(&evoformer_sm90_bwd_dpair_kernel<T, kHeadDim, kFactored>,
                              {num_dpair_blocks(p), Tile::kThreads, Tile::kSmemBytes}, p.stream, p);
}
template <typename T, int kHeadDim>
cudaError_t run_sm90_bwd_dpair(const Sm90Params& p) {
    if constexpr (kHeadDim >= kFactoredHeadDim) {
        if (p.redo != nullptr) return launch_sm90_bwd_dpair<T, kHeadDim, true>(p);
    }
    return launch_sm90_bwd_dpair<T, kHeadDim, false>(p);
}
template <typename T, int kHeadDim>
cudaError_t run_sm90_bwd_marked_dpair(const Sm90Params& p) {
    return p.redo != nullptr ? launch_sm90_bwd_dpair<T, kHeadDim, false>(p) : cudaSuccess;
}

}  // namespace ds4sci

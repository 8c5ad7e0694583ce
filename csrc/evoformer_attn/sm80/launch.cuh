// SPDX-License-Identifier: Apache-2.0
// Grids of the portable kernels, one function per kernel.
#pragma once
#include "launch.h"
#include "sm80/bwd_dkv_kernel.cuh"
#include "sm80/bwd_dpair_kernel.cuh"
#include "sm80/bwd_dq_kernel.cuh"
#include "sm80/fwd_kernel.cuh"

namespace ds4sci {

// Blocks that share a bias fragment over several rows pay only where there is a bias and more than one row.
template <typename T, int kHeadDim>
bool shares_bias(const KernelParams& p) {
    return kMaxRowsPerBlock<T, kHeadDim> > 1 && p.pair_bias != nullptr && p.rows_per_group > 1;
}

inline int64_t num_row_tiles(const KernelParams& p, int length, int tile, int rows_per_block) {
    return static_cast<int64_t>(ceil_div(length, tile)) * ceil_div(p.rows_per_group, rows_per_block) * p.heads *
           p.num_groups;
}

template <typename T, int kHeadDim, typename Tile>
cudaError_t launch_fwd(const KernelParams& p) {
    return launch_kernel(&evoformer_fwd_kernel<T, kHeadDim, Tile>,
                         num_row_tiles(p, p.q_len, Tile::kBlockM, Tile::kRows), Tile::kNumThreads,
                         Tile::smem_bytes(p.pair_element_bytes()), p.stream, p);
}
template <typename T, int kHeadDim>
cudaError_t run_evoformer_fwd(const KernelParams& p) {
    if (shares_bias<T, kHeadDim>(p))
        return launch_fwd<T, kHeadDim, FwdTile<T, kHeadDim, kMaxRowsPerBlock<T, kHeadDim>>>(p);
    return launch_fwd<T, kHeadDim, FwdTile<T, kHeadDim, 1>>(p);
}

template <typename T, int kHeadDim, typename Tile>
cudaError_t launch_bwd_dq(const KernelParams& p) {
    return launch_kernel(&evoformer_bwd_dq_kernel<T, kHeadDim, Tile>,
                         num_row_tiles(p, p.q_len, Tile::kBlockM, Tile::kRows), Tile::kNumThreads,
                         Tile::smem_bytes(p.pair_element_bytes()), p.stream, p);
}
template <typename T, int kHeadDim>
cudaError_t run_evoformer_bwd_dq(const KernelParams& p) {
    if (shares_bias<T, kHeadDim>(p))
        return launch_bwd_dq<T, kHeadDim, BwdDqTile<T, kHeadDim, kMaxRowsPerBlock<T, kHeadDim>>>(p);
    return launch_bwd_dq<T, kHeadDim, BwdDqTile<T, kHeadDim, 1>>(p);
}

template <typename T, int kHeadDim, typename Tile>
cudaError_t launch_bwd_dkv(const KernelParams& p) {
    return launch_kernel(&evoformer_bwd_dkv_kernel<T, kHeadDim, Tile>,
                         num_row_tiles(p, p.k_len, Tile::kBlockN, Tile::kRows), Tile::kNumThreads,
                         Tile::smem_bytes(p.pair_element_bytes()), p.stream, p);
}
template <typename T, int kHeadDim>
cudaError_t run_evoformer_bwd_dkv(const KernelParams& p) {
    if constexpr (kSplitsDkDv<T, kHeadDim>) {
        if (p.dv != nullptr) {
            const cudaError_t status = launch_bwd_dkv<T, kHeadDim, BwdDkvTile<T, kHeadDim, 1, kDvOnly>>(p);
            if (status != cudaSuccess) return status;
        }
        return launch_bwd_dkv<T, kHeadDim, BwdDkvTile<T, kHeadDim, 1, kDkOnly>>(p);
    } else {
        if (shares_bias<T, kHeadDim>(p))
            return launch_bwd_dkv<T, kHeadDim, BwdDkvTile<T, kHeadDim, kMaxRowsPerBlock<T, kHeadDim>>>(p);
        return launch_bwd_dkv<T, kHeadDim, BwdDkvTile<T, kHeadDim, 1>>(p);
    }
}

template <typename T, int kHeadDim>
cudaError_t run_evoformer_bwd_dpair(const KernelParams& p) {
    using Tile = BwdDpairTile<T, kHeadDim>;
    const int64_t tiles = static_cast<int64_t>(ceil_div(p.q_len, Tile::kBlockM)) * ceil_div(p.k_len, Tile::kBlockN);
    return launch_kernel(&evoformer_bwd_dpair_kernel<T, kHeadDim, Tile>,
                         tiles * p.heads * p.num_groups * p.dpair_splits, Tile::kNumThreads, Tile::kSmemBytes,
                         p.stream, p);
}

}  // namespace ds4sci

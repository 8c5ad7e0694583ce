// SPDX-License-Identifier: Apache-2.0
// d(pair_bias)[h, q, k] = sum over rows of dS. A block owns a tile of one head's bias, keeps its sum in fp32 registers
// and runs over its share of the rows in order: no atomics, the same bits in every run. Shares write buffers of their
// own.
#pragma once
#include "bias.h"
#include "kernel_params.h"
#include "sm80/tile_config.h"
#include "tile_mma.h"

namespace ds4sci {

// The bias of one warp's 16 x 8 * kTiles tile straight from global memory: it is read once per block.
template <typename T, int kTiles>
DS4SCI_DEVICE void read_global_bias(float (&bias)[kTiles][4], const KernelParams& p, int64_t offset, int q, int key,
                                    float ref_low, float ref_high) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int query = q + (e >> 1) * 8, column = key + j * 8 + (e & 1);
            bias[j][e] = 0.f;
            if (query >= p.q_len || column >= p.k_len) continue;
            const int64_t index = offset + query * p.pair_stride_q + column;
            const float value = p.pair_is_fp32() ? static_cast<const float*>(p.pair_bias)[index]
                                                 : to_float(static_cast<const T*>(p.pair_bias)[index]);
            bias[j][e] = value - (e >> 1 ? ref_high : ref_low);
        }
    }
}

template <typename T, int kHeadDim, typename Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, Tile::kMinBlocks)
    evoformer_bwd_dpair_kernel(const __grid_constant__ KernelParams p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Mma = TileMma<T, kHeadDim>;
    constexpr int kChunks = Tile::kBlockN / Tile::kChunkN, kTiles = Tile::kChunkN / 8, kThreads = Tile::kNumThreads;
    const uint32_t smem = smem_address(smem_base);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int quad = lane >> 2, pair = lane & 3;

    // Key tiles run fastest, then query tiles, heads, groups, shares: blocks that run together read the same rows.
    uint32_t block = blockIdx.x;
    const int num_key_tiles = ceil_div(p.k_len, Tile::kBlockN), num_q_tiles = ceil_div(p.q_len, Tile::kBlockM);
    const int key0 = static_cast<int>(block % num_key_tiles) * Tile::kBlockN;
    block /= num_key_tiles;
    const int q0 = static_cast<int>(block % num_q_tiles) * Tile::kBlockM;
    block /= num_q_tiles;
    const int head = static_cast<int>(block % p.heads);
    block /= p.heads;
    const int group = static_cast<int>(block % p.num_groups), share = static_cast<int>(block / p.num_groups);
    const int first_row = static_cast<int>(static_cast<int64_t>(p.rows_per_group) * share / p.dpair_splits);
    const int end_row = static_cast<int>(static_cast<int64_t>(p.rows_per_group) * (share + 1) / p.dpair_splits);
    const bool has_mask = p.mask != nullptr;

    using QueryCopy = TileCopy<T, kHeadDim, Tile::kBlockM, kThreads>;
    using KeyCopy = TileCopy<T, kHeadDim, Tile::kBlockN, kThreads>;
    RowLocation next_row = RowLocation::of(p, group, first_row);  // the one that load_stage loads next

    auto stage_of = [&](int i) { return smem + (i - first_row) % Tile::kStages * Tile::kStageBytes; };
    auto load_stage = [&](int i) {
        const uint32_t stage = stage_of(i), keys = stage + 2 * Tile::kQueryBytes;
        const int thread = opaque(threadIdx.x);  // the addresses do not change from row to row; held, they spill
        const RowLocation& row = next_row;
        auto load_queries = [&](uint32_t tile, const void* base, const RowStrides& stride) {
            QueryCopy::load(tile, row.template in<T>(base, stride, head), stride.l, q0, p.q_len, p.head_dim, thread);
        };
        auto load_keys = [&](uint32_t tile, const void* base, const RowStrides& stride) {
            KeyCopy::load(tile, row.template in<T>(base, stride, head), stride.l, key0, p.k_len, p.head_dim, thread);
        };
        load_queries(stage, p.q, p.q_stride);
        load_queries(stage + Tile::kQueryBytes, p.d_o, p.d_o_stride);
        load_keys(keys, p.k, p.k_stride);
        load_keys(keys + Tile::kKeyBytes, p.v, p.v_stride);
        if (has_mask) load_vector<Tile::kBlockN, kThreads>(stage + Tile::kMaskOffset, row.mask_of(p) + key0, thread);
        const int64_t first = row.head_row(p, head) * p.q_len_padded + q0;
        load_vector<Tile::kBlockM * 2, kThreads>(stage + Tile::kStatsOffset,
                                                 reinterpret_cast<const float*>(p.row_stats + first), thread);
        if (sizeof(T) == 4) load_vector<Tile::kBlockM, kThreads>(stage + Tile::kLowOffset, p.lse_low + first, thread);
        next_row.advance(p);
    };

    if (p.head_dim < kHeadDim) {
#pragma unroll 1
        for (int i = first_row; i < first_row + Tile::kStages; ++i) {
            QueryCopy::clear_padding(stage_of(i), p.head_dim, thread);
            QueryCopy::clear_padding(stage_of(i) + Tile::kQueryBytes, p.head_dim, thread);
            KeyCopy::clear_padding(stage_of(i) + 2 * Tile::kQueryBytes, p.head_dim, thread);
            KeyCopy::clear_padding(stage_of(i) + 2 * Tile::kQueryBytes + Tile::kKeyBytes, p.head_dim, thread);
        }
    }
    if (first_row < end_row) {
        load_stage(first_row);
        cp_async_commit();
    }
    const int q = q0 + warp * 16 + quad;
    const float* refs = pair_max_of(p, group, head) + q;
    const float ref_low = refs[0], ref_high = refs[8];
    float bias[kChunks][kTiles][4], sum[kChunks][kTiles][4];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        read_global_bias<T>(bias[c], p, pair_offset(p, group, head), q, key0 + c * Tile::kChunkN + pair * 2, ref_low,
                            ref_high);
        zero_bias(sum[c]);
    }

    for (int i = first_row; i < end_row; ++i) {
        cp_async_wait<0>();
        block_sync();
        if (Tile::kStages > 1 && i + 1 < end_row) {
            load_stage(i + 1);
            cp_async_commit();
        }
        const uint32_t stage = stage_of(i), query = stage + warp * 16 * Tile::kPitch;
        const uint32_t stats = stage + Tile::kStatsOffset + (warp * 16 + quad) * 8;
        const float2 stat_low = lds_f32x2(stats),
                     stat_high = lds_f32x2(stats + 64);  // {lse, delta} of rows quad, quad + 8
        float rest_low = 0.f, rest_high = 0.f;
        if (sizeof(T) == 4) {
            rest_low = lds_f32(stage + Tile::kLowOffset + (warp * 16 + quad) * 4);
            rest_high = lds_f32(stage + Tile::kLowOffset + (warp * 16 + quad + 8) * 4);
        }
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            const uint32_t k = stage + 2 * Tile::kQueryBytes + c * Tile::kChunkN * Tile::kPitch;
            float s[kTiles][4];
            Mma::product_abt(s, query, k, lane);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) s[j][e] = fmaf(s[j][e], p.softmax_scale, bias[c][j][e]);
            }
            if (has_mask) add_mask(s, stage + Tile::kMaskOffset + c * Tile::kChunkN * 4, lane);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    s[j][e] =
                        probability<T>(s[j][e], e >> 1 ? stat_high.x : stat_low.x, e >> 1 ? rest_high : rest_low);
                }
            }
            float dp[kTiles][4];
            Mma::product_abt(dp, query + Tile::kQueryBytes, k + Tile::kKeyBytes, lane);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    sum[c][j][e] = fmaf(s[j][e], dp[j][e] - (e >> 1 ? stat_high.y : stat_low.y), sum[c][j][e]);
                }
            }
        }
        if (Tile::kStages == 1 && i + 1 < end_row) {
            block_sync();
            load_stage(i + 1);
            cp_async_commit();
        }
    }

    const int64_t plane = (static_cast<int64_t>(share) * p.num_groups + group) * p.heads + head;
    float* out = p.dpair_bias + plane * p.q_len * p.k_len;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int query = q + (e >> 1) * 8, column = key0 + c * Tile::kChunkN + j * 8 + pair * 2 + (e & 1);
                if (query < p.q_len && column < p.k_len)
                    out[static_cast<int64_t>(query) * p.k_len + column] = sum[c][j][e];
            }
        }
    }
}

}  // namespace ds4sci

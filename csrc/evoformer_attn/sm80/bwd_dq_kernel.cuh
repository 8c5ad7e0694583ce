// SPDX-License-Identifier: Apache-2.0
// dQ = scale * dS K with dS = P * (dO V^T - delta) and P recomputed from lse. A block owns its queries: no atomics.
#pragma once
#include "bias.h"
#include "kernel_params.h"
#include "sm80/tile_config.h"
#include "tile_mma.h"

namespace ds4sci {

template <typename T, int kHeadDim, typename Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, Tile::kMinBlocks)
    evoformer_bwd_dq_kernel(const __grid_constant__ KernelParams p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Mma = TileMma<T, kHeadDim>;
    constexpr int kRows = Tile::kRows, kTiles = Tile::kBlockN / 8, kThreads = Tile::kNumThreads;
    const uint32_t smem = smem_address(smem_base);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int quad = lane >> 2;

    const WorkItem item =
        decode_work_item(blockIdx.x, ceil_div(p.q_len, Tile::kBlockM), ceil_div(p.rows_per_group, kRows), p);
    const int q0 = item.tile * Tile::kBlockM;
    const bool has_pair = p.pair_bias != nullptr, has_mask = p.mask != nullptr;
    const int pair_bytes = p.pair_element_bytes(), pitch = bias_pitch(Tile::kBlockN, pair_bytes);
    const int bias_stage_bytes = Tile::bias_bytes(pair_bytes);

    const int64_t pair_base = has_pair ? pair_offset(p, item.group, item.head) : 0;
    using QueryCopy = TileCopy<T, kHeadDim, Tile::kBlockM, kThreads>;
    using KeyCopy = TileCopy<T, kHeadDim, Tile::kBlockN, kThreads>;
    RowLocation rows[kRows];
    const T *k_rows[kRows], *v_rows[kRows];
    const float* masks[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        rows[r] = RowLocation::of(p, item.group, item.row_block * kRows + r);
        const RowLocation& row = rows[r];
        k_rows[r] = warp_uniform(row.template in<T>(p.k, p.k_stride, item.head));
        v_rows[r] = warp_uniform(row.template in<T>(p.v, p.v_stride, item.head));
        masks[r] = has_mask ? warp_uniform(row.mask_of(p)) : nullptr;
    }

    auto query_of = [&](int r) { return smem + 2 * r * Tile::kQueryBytes; };  // Q, then dO
    auto stage_of = [&](int key_tile) {
        return smem + Tile::kStageOffset + key_tile % Tile::kStages * Tile::kStageBytes;
    };
    auto bias_of = [&](int key_tile) {
        return smem + Tile::kBiasOffset + key_tile % Tile::kStages * bias_stage_bytes;
    };
    auto load_stage = [&](int key_tile) {
        const int key = key_tile * Tile::kBlockN;
        if (has_pair)
            BiasCopy<Tile::kBlockM, Tile::kBlockN, kThreads>::load(bias_of(key_tile), p, pair_base, q0, key, thread);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint32_t stage = stage_of(key_tile) + r * Tile::kRowStageBytes;
            KeyCopy::load(stage, k_rows[r], p.k_stride.l, key, p.k_len, p.head_dim, thread);
            KeyCopy::load(stage + Tile::kKeyBytes, v_rows[r], p.v_stride.l, key, p.k_len, p.head_dim, thread);
            if (has_mask) load_vector<Tile::kBlockN, kThreads>(stage + 2 * Tile::kKeyBytes, masks[r] + key, thread);
        }
    };

    if (p.head_dim < kHeadDim) {
#pragma unroll 1
        for (int r = 0; r < kRows; ++r) {
            QueryCopy::clear_padding(query_of(r), p.head_dim, thread);
            QueryCopy::clear_padding(query_of(r) + Tile::kQueryBytes, p.head_dim, thread);
#pragma unroll 1
            for (int stage = 0; stage < Tile::kStages; ++stage) {
                KeyCopy::clear_padding(stage_of(stage) + r * Tile::kRowStageBytes, p.head_dim, thread);
                KeyCopy::clear_padding(stage_of(stage) + r * Tile::kRowStageBytes + Tile::kKeyBytes, p.head_dim,
                                       thread);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        QueryCopy::load(query_of(r), rows[r].template in<T>(p.q, p.q_stride, item.head), p.q_stride.l, q0, p.q_len,
                        p.head_dim, thread);
        QueryCopy::load(query_of(r) + Tile::kQueryBytes, rows[r].template in<T>(p.d_o, p.d_o_stride, item.head),
                        p.d_o_stride.l, q0, p.q_len, p.head_dim, thread);
    }
    load_stage(0);
    cp_async_commit();

    float ref_low = 0.f, ref_high = 0.f;
    if (has_pair) {
        const float* refs = pair_max_of(p, item.group, item.head) + q0 + warp * 16 + quad;
        ref_low = refs[0];
        ref_high = refs[8];
    }
    float dq[kRows][kHeadDim / 8][4];
    float2 stats[kRows][2];  // {lse, delta} of rows quad, quad + 8
    float lse_low[kRows][2];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        zero_bias(dq[r]);
        const int64_t first = rows[r].head_row(p, item.head) * p.q_len_padded + q0 + warp * 16 + quad;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            stats[r][i] = p.row_stats[first + 8 * i];
            lse_low[r][i] = sizeof(T) == 4 ? p.lse_low[first + 8 * i] : 0.f;
        }
    }

    const int num_key_tiles = ceil_div(p.k_len, Tile::kBlockN);
    for (int key_tile = 0; key_tile < num_key_tiles; ++key_tile) {
        cp_async_wait<0>();
        block_sync();
        if (Tile::kStages > 1 && key_tile + 1 < num_key_tiles) {
            load_stage(key_tile + 1);
            cp_async_commit();
        }
        float bias[kTiles][4];
        if (has_pair) {
            read_bias<T>(bias, bias_of(key_tile) + warp * 16 * pitch, pitch, p.pair_is_fp32(), ref_low, ref_high,
                         lane);
        } else {
            zero_bias(bias);
        }
        const int valid_keys = p.k_len - key_tile * Tile::kBlockN;
        if (valid_keys < Tile::kBlockN) drop_columns(bias, valid_keys, lane);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint32_t query = query_of(r) + warp * 16 * Tile::kPitch;
            const uint32_t k = stage_of(key_tile) + r * Tile::kRowStageBytes, v = k + Tile::kKeyBytes;
            float s[kTiles][4], dp[kTiles][4];
            Mma::product_abt(s, query, k, lane);
            Mma::product_abt(dp, query + Tile::kQueryBytes, v, lane);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) s[j][e] = fmaf(s[j][e], p.softmax_scale, bias[j][e]);
            }
            if (has_mask) add_mask(s, k + 2 * Tile::kKeyBytes, lane);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = e >> 1;
                    s[j][e] = probability<T>(s[j][e], stats[r][i].x, lse_low[r][i]) * (dp[j][e] - stats[r][i].y);
                }
            }
            Mma::product_pb(dq[r], s, k, lane);
        }
        if (Tile::kStages == 1 && key_tile + 1 < num_key_tiles) {
            block_sync();
            load_stage(key_tile + 1);
            cp_async_commit();
        }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const RowLocation& row = rows[r];
        const int q = q0 + warp * 16;
        store_accumulator<T, kHeadDim>(
            row.template out<T>(p, p.dq, p.q_len, item.head) + static_cast<int64_t>(q) * p.heads * p.head_dim,
            static_cast<int64_t>(p.heads) * p.head_dim, row.valid ? p.q_len - q : 0, p.head_dim,
            query_of(r) + warp * 16 * Tile::kPitch, dq[r], p.softmax_scale, p.softmax_scale, lane);
    }
}

}  // namespace ds4sci

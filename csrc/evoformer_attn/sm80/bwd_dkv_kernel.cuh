// SPDX-License-Identifier: Apache-2.0
// dV = P^T dO, dK = scale * dS^T Q, and d(mask_bias) per head = sum of dS over queries. A block owns its keys and runs
// over queries in order: no atomics. The products are transposed, S^T = K Q^T and dP^T = V dO^T.
#pragma once
#include "bias.h"
#include "kernel_params.h"
#include "sm80/tile_config.h"
#include "tile_mma.h"

namespace ds4sci {

template <typename T, int kHeadDim, typename Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, Tile::kMinBlocks)
    evoformer_bwd_dkv_kernel(const __grid_constant__ KernelParams p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Mma = TileMma<T, kHeadDim>;
    constexpr int kRows = Tile::kRows, kTiles = Tile::kBlockM / 8, kThreads = Tile::kNumThreads;
    const uint32_t smem = smem_address(smem_base);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int quad = lane >> 2, pair = lane & 3;

    const WorkItem item =
        decode_work_item(blockIdx.x, ceil_div(p.k_len, Tile::kBlockN), ceil_div(p.rows_per_group, kRows), p);
    const int key0 = item.tile * Tile::kBlockN;
    const bool has_pair = p.pair_bias != nullptr, has_mask = p.mask != nullptr;
    const int pair_bytes = p.pair_element_bytes(), pitch = bias_pitch(Tile::kBlockN, pair_bytes);
    const int bias_stage_bytes = Tile::bias_bytes(pair_bytes);

    const int64_t pair_base = has_pair ? pair_offset(p, item.group, item.head) : 0;
    using KeyCopy = TileCopy<T, kHeadDim, Tile::kBlockN, kThreads>;
    using QueryCopy = TileCopy<T, kHeadDim, Tile::kBlockM, kThreads>;
    const float* pair_max = has_pair ? pair_max_of(p, item.group, item.head) : nullptr;
    RowLocation rows[kRows];
    const T *q_rows[kRows], *d_o_rows[kRows];
    const float2* stats_rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        rows[r] = RowLocation::of(p, item.group, item.row_block * kRows + r);
        const RowLocation& row = rows[r];
        q_rows[r] = warp_uniform(row.template in<T>(p.q, p.q_stride, item.head));
        d_o_rows[r] = warp_uniform(row.template in<T>(p.d_o, p.d_o_stride, item.head));
        stats_rows[r] = warp_uniform(p.row_stats + row.head_row(p, item.head) * p.q_len_padded);
    }

    auto key_of = [&](int r) { return smem + 2 * r * Tile::kKeyBytes; };  // K, then V
    auto mask_of = [&](int r) { return smem + Tile::kMaskOffset + r * Tile::kBlockN * 4; };
    auto stage_of = [&](int q_tile) { return smem + Tile::kStageOffset + q_tile % Tile::kStages * Tile::kStageBytes; };
    auto refs_of = [&](int q_tile) { return stage_of(q_tile) + Tile::kRefsOffset; };
    auto bias_of = [&](int q_tile) { return smem + Tile::kBiasOffset + q_tile % Tile::kStages * bias_stage_bytes; };
    auto load_stage = [&](int q_tile) {
        const int query = q_tile * Tile::kBlockM;
        const int thread = opaque(threadIdx.x);  // addresses held from tile to tile would spill at D = 128
        if (has_pair) {
            BiasCopy<Tile::kBlockM, Tile::kBlockN, kThreads>::load(bias_of(q_tile), p, pair_base, query, key0, thread);
            load_vector<Tile::kBlockM, kThreads>(refs_of(q_tile), pair_max + query, thread);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint32_t stage = stage_of(q_tile) + r * Tile::kRowStageBytes, stats = stage + 2 * Tile::kQueryBytes;
            QueryCopy::load(stage, q_rows[r], p.q_stride.l, query, p.q_len, p.head_dim, thread);
            QueryCopy::load(stage + Tile::kQueryBytes, d_o_rows[r], p.d_o_stride.l, query, p.q_len, p.head_dim,
                            thread);
            load_vector<Tile::kBlockM * 2, kThreads>(stats, reinterpret_cast<const float*>(stats_rows[r] + query),
                                                     thread);
            if (sizeof(T) == 4) {
                load_vector<Tile::kBlockM, kThreads>(stats + Tile::kBlockM * 8,
                                                     p.lse_low + (stats_rows[r] - p.row_stats) + query, thread);
            }
        }
    };

    if (p.head_dim < kHeadDim) {
#pragma unroll 1
        for (int r = 0; r < kRows; ++r) {
            KeyCopy::clear_padding(key_of(r), p.head_dim, thread);
            KeyCopy::clear_padding(key_of(r) + Tile::kKeyBytes, p.head_dim, thread);
#pragma unroll 1
            for (int stage = 0; stage < Tile::kStages; ++stage) {
                QueryCopy::clear_padding(stage_of(stage) + r * Tile::kRowStageBytes, p.head_dim, thread);
                QueryCopy::clear_padding(stage_of(stage) + r * Tile::kRowStageBytes + Tile::kQueryBytes, p.head_dim,
                                         thread);
            }
        }
    }
    float dk[kRows][kHeadDim / 8][4], dv[kRows][kHeadDim / 8][4];
    float dmask[kRows][2];  // of keys quad, quad + 8
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        KeyCopy::load(key_of(r), rows[r].template in<T>(p.k, p.k_stride, item.head), p.k_stride.l, key0, p.k_len,
                      p.head_dim, thread);
        KeyCopy::load(key_of(r) + Tile::kKeyBytes, rows[r].template in<T>(p.v, p.v_stride, item.head), p.v_stride.l,
                      key0, p.k_len, p.head_dim, thread);
        zero_bias(dk[r]);
        zero_bias(dv[r]);
        dmask[r][0] = dmask[r][1] = 0.f;
        if (has_mask) load_vector<Tile::kBlockN, kThreads>(mask_of(r), rows[r].mask_of(p) + key0, thread);
    }
    load_stage(0);
    cp_async_commit();

    const int num_q_tiles = ceil_div(p.q_len, Tile::kBlockM);
    for (int q_tile = 0; q_tile < num_q_tiles; ++q_tile) {
        cp_async_wait<0>();
        block_sync();
        if (Tile::kStages > 1 && q_tile + 1 < num_q_tiles) {
            load_stage(q_tile + 1);
            cp_async_commit();
        }
        float bias[kTiles][4];
        if (has_pair) {
            read_bias_transposed<T>(bias, bias_of(q_tile) + warp * 16 * pair_bytes, pitch, p.pair_is_fp32(),
                                    refs_of(q_tile), lane);
        } else {
            zero_bias(bias);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint32_t k = key_of(r) + warp * 16 * Tile::kPitch;
            const uint32_t q = stage_of(q_tile) + r * Tile::kRowStageBytes, d_o = q + Tile::kQueryBytes;
            const uint32_t stats = d_o + Tile::kQueryBytes + pair * 16;
            const uint32_t mask_address = mask_of(r) + (warp * 16 + quad) * 4;
            const float mask[2] = {has_mask ? lds_f32(mask_address) : 0.f,
                                   has_mask ? lds_f32(mask_address + 32) : 0.f};
            // S first, dP only when P is done: together they would not fit the registers.
            float s[kTiles][4];
            Mma::product_abt(s, k, q, lane);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                const float4 stat = lds_f32x4(stats + j * 64);  // {lse, delta} of two neighbouring queries
                float2 low = make_float2(0.f, 0.f);
                if (sizeof(T) == 4)
                    low = lds_f32x2(d_o + Tile::kQueryBytes + Tile::kBlockM * 8 + (j * 8 + pair * 2) * 4);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float x = fmaf(s[j][e], p.softmax_scale, bias[j][e]) + mask[e >> 1];
                    s[j][e] = probability<T>(x, e & 1 ? stat.z : stat.x, e & 1 ? low.y : low.x);
                }
            }
            if constexpr (Tile::kDv) Mma::product_pb(dv[r], s, d_o, lane);
            if constexpr (!Tile::kDk) continue;
            float dp[kTiles][4];
            Mma::product_abt(dp, k + Tile::kKeyBytes, d_o, lane);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                const float4 stat = lds_f32x4(stats + j * 64);
#pragma unroll
                for (int e = 0; e < 4; ++e) dp[j][e] = s[j][e] * (dp[j][e] - (e & 1 ? stat.w : stat.y));
            }
            Mma::product_pb(dk[r], dp, q, lane);
            if (p.dmask_bias != nullptr) {
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
                    dmask[r][0] += dp[j][0] + dp[j][1];
                    dmask[r][1] += dp[j][2] + dp[j][3];
                }
            }
        }
        if (Tile::kStages == 1 && q_tile + 1 < num_q_tiles) {
            block_sync();
            load_stage(q_tile + 1);
            cp_async_commit();
        }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const RowLocation& row = rows[r];
        const int key = key0 + warp * 16, valid = row.valid ? p.k_len - key : 0;
        const int64_t stride = static_cast<int64_t>(p.heads) * p.head_dim;
        const uint32_t scratch = key_of(r) + warp * 16 * Tile::kPitch;
        if (Tile::kDk && p.dk != nullptr) {
            store_accumulator<T, kHeadDim>(row.template out<T>(p, p.dk, p.k_len, item.head) + key * stride, stride,
                                           valid, p.head_dim, scratch, dk[r], p.softmax_scale, p.softmax_scale, lane);
        }
        if (Tile::kDv && p.dv != nullptr) {
            store_accumulator<T, kHeadDim>(row.template out<T>(p, p.dv, p.k_len, item.head) + key * stride, stride,
                                           valid, p.head_dim, scratch + Tile::kKeyBytes, dv[r], 1.f, 1.f, lane);
        }
        if (Tile::kDk && p.dmask_bias != nullptr) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                dmask[r][i] += shfl_xor(dmask[r][i], 1);
                dmask[r][i] += shfl_xor(dmask[r][i], 2);
                const int offset = quad + 8 * i;
                if (pair == 0 && offset < valid)
                    p.dmask_bias[row.head_row(p, item.head) * p.k_len + key + offset] = dmask[r][i];
            }
        }
    }
}

}  // namespace ds4sci

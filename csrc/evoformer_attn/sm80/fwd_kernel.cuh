// SPDX-License-Identifier: Apache-2.0
// Forward: o = softmax(scale q k^T + mask_bias + pair_bias) v for kBlockM queries of kRows rows, key tile by key tile;
// with a gate times its sigmoid.
#pragma once
#include "bias.h"
#include "gate.h"
#include "kernel_params.h"
#include "sm80/tile_config.h"
#include "softmax.h"
#include "tile_mma.h"

namespace ds4sci {

template <typename T, int kHeadDim, typename Tile>
__global__ void __launch_bounds__(Tile::kNumThreads, Tile::kMinBlocks)
    evoformer_fwd_kernel(const __grid_constant__ KernelParams p) {
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

    auto query_of = [&](int r) { return smem + r * Tile::kQueryBytes; };
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
    }
    load_stage(0);
    cp_async_commit();

    float ref_low = 0.f, ref_high = 0.f;
    if (has_pair) {
        const float* refs = pair_max_of(p, item.group, item.head) + q0 + warp * 16 + quad;
        ref_low = refs[0];
        ref_high = refs[8];
    }
    float o[kRows][kHeadDim / 8][4];
    OnlineSoftmax softmax[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        softmax[r].reset();
        zero_bias(o[r]);
    }

    const int num_key_tiles = ceil_div(p.k_len, Tile::kBlockN);
    for (int key_tile = 0; key_tile < num_key_tiles; ++key_tile) {
        cp_async_wait<0>();
        block_sync();  // the tile is here, and nobody still reads the stage that is loaded next
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
            const uint32_t stage = stage_of(key_tile) + r * Tile::kRowStageBytes;
            float x[kTiles][4];
            Mma::product_abt(x, query_of(r) + warp * 16 * Tile::kPitch, stage, lane);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) x[j][e] = fmaf(x[j][e], p.softmax_scale, bias[j][e]);
            }
            if (has_mask) add_mask(x, stage + 2 * Tile::kKeyBytes, lane);
            softmax[r].update(x, o[r]);
            Mma::product_pb(o[r], x, stage + Tile::kKeyBytes, lane);
        }

        if (Tile::kStages == 1 && key_tile + 1 < num_key_tiles) {
            block_sync();
            load_stage(key_tile + 1);
            cp_async_commit();
        }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        softmax[r].finish();
        const RowLocation& row = rows[r];
        const int q = q0 + warp * 16;
        const int valid = row.valid ? p.q_len - q : 0;
        if (p.gate != nullptr) {
            apply_gate<T, kHeadDim>(o[r], row.template in<T>(p.gate, p.gate_stride, item.head) + q * p.gate_stride.l,
                                    p.gate_stride.l, valid, p.head_dim, lane);
        }
        store_accumulator<T, kHeadDim>(
            row.template out<T>(p, p.o, p.q_len, item.head) + static_cast<int64_t>(q) * p.heads * p.head_dim,
            static_cast<int64_t>(p.heads) * p.head_dim, valid, p.head_dim, query_of(r) + warp * 16 * Tile::kPitch,
            o[r], softmax[r].normaliser(0), softmax[r].normaliser(1), lane);
        if ((lane & 3) == 0) {
            using Lse = typename LseType<T>::type;
            Lse* lse = static_cast<Lse*>(p.lse) + row.head_row(p, item.head) * p.q_len + q;
            if (quad < valid) lse[quad] = softmax[r].template lse<Lse>(0);
            if (quad + 8 < valid) lse[quad + 8] = softmax[r].template lse<Lse>(1);
        }
    }
}

}  // namespace ds4sci

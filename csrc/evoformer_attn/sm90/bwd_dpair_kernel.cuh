// SPDX-License-Identifier: Apache-2.0
// d(pair_bias) = sum over rows n of dS on Hopper. A block owns 128 queries x 128 keys of one head, a warpgroup a
// quarter of them; the sum stays in registers over all rows of the block's share, in their order.
#pragma once
#include "bias.h"
#include "finish_kernel.cuh"
#include "sm90/tile_config.h"

namespace ds4sci {

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Sm90BwdDpairTile<kHeadDim>::kThreads, 1)
    evoformer_sm90_bwd_dpair_kernel(const __grid_constant__ Sm90Params p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Tile = Sm90BwdDpairTile<kHeadDim>;
    using Rows = RowTile<kHeadDim>;
    const int warp = warp_uniform(static_cast<int>(threadIdx.x / 32)), lane = threadIdx.x % 32;
    // Key blocks run fastest, so that blocks that run together share Q and dO in L2.
    const int num_k_blocks = ceil_div(p.k_len, Tile::kPositions), num_q_blocks = ceil_div(p.q_len, Tile::kPositions);
    uint32_t block = blockIdx.x;
    const int key0 = block % num_k_blocks * Tile::kPositions;
    block /= num_k_blocks;
    const int q0 = block % num_q_blocks * Tile::kPositions;
    block /= num_q_blocks;
    const int head = block % p.heads;
    block /= p.heads;
    const int group = block % p.num_groups, split = block / p.num_groups;
    const int first = static_cast<int64_t>(p.rows_per_group) * split / p.dpair_splits;
    const int last = static_cast<int64_t>(p.rows_per_group) * (split + 1) / p.dpair_splits;

    check_smem_base(smem_base);
    Ring<Tile::kStages> ring{static_cast<uint32_t>(Tile::kBarrierOffset)};
    const uint32_t bias_barrier = ring.barriers + ring.kBytes;
    if (threadIdx.x == 0) {
        sts_u32(Tile::kLastOffset, last);
        ring.init(ring.barriers, Tile::kConsumerWarps);
        mbarrier_init(bias_barrier, 1);
        mbarrier_init_fence();
    }
    wait_for_previous_kernels();
    let_next_kernel_start();
    block_sync();

    if (warp >= Tile::kConsumerWarps) {
        release_registers<Tile::kProducerRegisters>();
        if (warp != Tile::kConsumerWarps || lane != 0) return;
        mbarrier_arrive_expect(bias_barrier, 4 * kBiasTileBytes);
        for (int i = 0; i < 4; ++i)
            tma_load(Tile::kBiasOffset + i * kBiasTileBytes, &p.pair_map, bias_barrier, key0 + i / 2 * kTileRows,
                     q0 + i % 2 * kTileRows, p.pair_heads == 1 ? 0 : head, p.pair_batch == 1 ? 0 : group);
        for (int n = first; n < last; ++n) {
            const RowLocation row = RowLocation::of(p, group, n);
            const int64_t stat = row.head_row(p, head) * p.q_len_padded + q0;
            const uint32_t stage = kSmemBase + ring.stage * Tile::kStageBytes, barrier = ring.full();
            ring.wait_empty();
            ring.announce(Tile::kStageBytes);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int q = q0 + half * kTileRows, key = key0 + half * kTileRows;
                const uint32_t tile = stage + half * Tile::kTileBytes;
                tma_load(tile + Tile::kQueryOffset, &p.q_map, barrier, 0, q, head, row.n, row.b);
                tma_load(tile + Tile::kDOOffset, &p.d_o_map, barrier, 0, q, head, row.n, row.b);
                tma_load(tile + Tile::kKeyOffset, &p.k_map, barrier, 0, key, head, row.n, row.b);
                tma_load(tile + Tile::kValueOffset, &p.v_map, barrier, 0, key, head, row.n, row.b);
            }
            bulk_load(stage + Tile::kQueryAuxOffset, p.query_aux + stat, 2 * kAuxTileBytes, barrier);
            bulk_load(stage + Tile::kKeyAuxOffset, p.key_aux + p.key_row(row.b, row.n) * p.k_len_padded + key0,
                      2 * kAuxTileBytes, barrier);
            ring.advance();
        }
    } else {
        take_registers<Tile::kConsumerRegisters>();
        const int warpgroup = warp / 4, warp_row = warp % 4 * 16;
        const int q_half = warpgroup % 2, key_half = warpgroup / 2;
        const int quad = lane >> 2, pair = lane & 3;
        const uint32_t bias_address =
            kept(Tile::kBiasOffset + warpgroup * kBiasTileBytes + bias_fragment(warp_row, lane));
        const float scale_log2 = p.softmax_scale * kBiasLog2E<T>;
        const int q = q_half * kTileRows + warp_row + quad;  // within the block: this lane's first query, then + 8
        const float* refs = pair_row(p, p.pair_ref, {0, 0, head, group}) + q0 + q;
        const float ref[2] = {refs[0], refs[8]};
        const MatrixOperand query_tiles = Rows::over_dim(kSmemBase + Tile::kQueryOffset + q_half * Tile::kTileBytes);
        const MatrixOperand key_tiles = Rows::over_dim(kSmemBase + Tile::kKeyOffset + key_half * Tile::kTileBytes);
        const MatrixOperand aux_tiles = aux_operand(kSmemBase + Tile::kKeyAuxOffset + key_half * kAuxTileBytes);
        const uint32_t query_aux = kept(kSmemBase + Tile::kQueryAuxOffset + q * 16 + pair * 4);
        float sum[8][4];
        zero_bias(sum);
        mbarrier_wait(bias_barrier, 0);
        // What the bias adds is the same for all rows.
        float biased[Tile::kBiasInRegisters ? 8 : 4][4];
        auto add_bias = [&](float (&low_keys)[4], float (&high_keys)[4], uint32_t address) {
            uint32_t bias[4];
            ldmatrix_x4(bias, address);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float2 low_bias = unpack2<T>(bias[2 * j]), high_bias = unpack2<T>(bias[2 * j + 1]);
                const float b[4] = {low_bias.x, low_bias.y, high_bias.x, high_bias.y};
                float (&of)[4] = j == 0 ? low_keys : high_keys;
#pragma unroll
                for (int e = 0; e < 4; ++e) of[e] = fmaf(b[e], kBiasLog2E<T>, -ref[e / 2]);
            }
        };
        if constexpr (Tile::kBiasInRegisters) {
#pragma unroll
            for (int i = 0; i < 4; ++i) add_bias(biased[2 * i], biased[2 * i + 1], bias_address ^ (i * 32));
        }
        // Where registers are scarce, shared memory keeps their number.
        for (int n = first; n < (Tile::kBiasInRegisters ? static_cast<int>(lds_u32(Tile::kLastOffset)) : last); ++n) {
            const uint32_t offset = ring.stage * Tile::kStageBytes;
            ring.wait_full();
            const uint32_t low = lds_u32(query_aux + offset), high = lds_u32(query_aux + offset + 128);
            const AuxOperand s_aux = AuxOperand::of_s(low, high, pair), dp_aux = AuxOperand::of_dp(low, high, pair);
            // 32 keys at a time: S and dP of 64 would not fit beside the sums.
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const MatrixOperand queries = query_tiles.plus(offset);
                const MatrixOperand keys = key_tiles.plus(offset + part * Tile::kTileBytes / 2);
                const MatrixOperand key_aux = aux_tiles.plus(offset + part * kAuxTileBytes / 2);
                float s[4][4], dp[4][4];
                wgmma_fence();
                Rows::template product_abt<T>(s, queries, keys);
                wgmma_rs<bf16, false>(s, s_aux.words, key_aux);
                wgmma_commit();
                Rows::template product_abt<T>(dp, queries.plus(Tile::kDOOffset - Tile::kQueryOffset),
                                              keys.plus(Tile::kValueOffset - Tile::kKeyOffset));
                wgmma_rs<bf16, false>(dp, dp_aux.words, key_aux);
                wgmma_commit();
                if constexpr (!Tile::kBiasInRegisters) {  // worked out while the products run
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        add_bias(biased[2 * i], biased[2 * i + 1], bias_address ^ (part * 64 + i * 32));
                }
                wgmma_wait<1>();
                wgmma_complete(s);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        s[j][e] = exp2_approx(
                            fmaf(s[j][e], scale_log2, biased[(Tile::kBiasInRegisters ? part * 4 : 0) + j][e]));
                }
                wgmma_wait<0>();
                wgmma_complete(dp);
                if (part == 1) mbarrier_arrive_if(ring.empty(), lane == 0);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[part * 4 + j][e] = fmaf(s[j][e], dp[j][e], sum[part * 4 + j][e]);
                }
            }
            ring.advance();
        }
        store_dpair_share<T>(p, split, group, head, q0 + q, key0 + key_half * kTileRows + pair * 2, sum);
    }
}

}  // namespace ds4sci

// SPDX-License-Identifier: Apache-2.0
// d(pair_bias) = sum over rows n of dS on Hopper. A block owns 128 queries x 128 keys of one head, a warpgroup a
// quarter of them; the sum stays in registers over all rows of the block's share, in their order.
//
// What the bias adds to a logit is the same for all rows, so its power is a factor of the whole sum:
//     sum over n of exp(s_n + bias - lse_n) dP_n = exp(bias) * sum over n of exp(s_n - lse_n) dP_n
// So with enough work (plan.h) a block multiplies once, behind the last row, and has registers for 64 keys at a time
// where the bias would be. The terms of such a factored sum leave the range of fp32 where the bias holds down a logit
// 88 above the lse of its row. A sum that is not finite marks its block, and this kernel with sums of whole terms,
// launched later, computes marked blocks again; the others return at once.
#pragma once
#include "bias.h"
#include "finish_kernel.cuh"
#include "sm90/tile_config.h"

namespace ds4sci {

// What a block computes.
struct DpairBlock {
    int q0, key0, head, group, split;

    static DS4SCI_DEVICE DpairBlock of(const KernelParams& p, uint32_t block) {
        DpairBlock its;
        // Key blocks run fastest, so that blocks that run together share Q and dO in L2.
        const int num_k_blocks = ceil_div(p.k_len, kDpairPositions), num_q_blocks = ceil_div(p.q_len, kDpairPositions);
        its.key0 = block % num_k_blocks * kDpairPositions;
        block /= num_k_blocks;
        its.q0 = block % num_q_blocks * kDpairPositions;
        block /= num_q_blocks;
        its.head = block % p.heads;
        block /= p.heads;
        its.group = block % p.num_groups, its.split = block / p.num_groups;
        return its;
    }
};

// This lane's place in the block's 128 x 128 sums: queries `query` and `query` + 8, keys `key`, + 1 and + 8 each.
struct DpairLane {
    int query, key;

    static DS4SCI_DEVICE DpairLane of(int thread) {
        const int warpgroup = thread / 128, warp_row = thread / 32 % 4 * 16, lane = thread % 32;
        return {warpgroup % 2 * kTileRows + warp_row + lane / 4, warpgroup / 2 * kTileRows + lane % 4 * 2};
    }
};

// What the bias adds to its logits, the same for all rows.
template <typename T>
struct DpairBias {
    uint32_t address;  // in shared memory; of the next 16 keys: xor 32
    float ref[2];

    static DS4SCI_DEVICE DpairBias of(const Sm90Params& p, const DpairBlock& its, uint32_t tiles, int thread) {
        const float* refs =
            pair_row(p, p.pair_ref, {0, 0, its.head, its.group}) + its.q0 + DpairLane::of(thread).query;
        return {tiles + thread / 128 * kBiasTileBytes + bias_fragment(thread / 32 % 4 * 16, thread % 32),
                {refs[0], refs[8]}};
    }
    DS4SCI_DEVICE void read(float (&low_keys)[4], float (&high_keys)[4], uint32_t offset) const {
        uint32_t bias[4];
        ldmatrix_x4(bias, address ^ offset);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const float2 low = unpack2<T>(bias[2 * j]), high = unpack2<T>(bias[2 * j + 1]);
            const float b[4] = {low.x, low.y, high.x, high.y};
            float (&of)[4] = j == 0 ? low_keys : high_keys;
#pragma unroll
            for (int e = 0; e < 4; ++e) of[e] = fmaf(b[e], kBiasLog2E<T>, -ref[e / 2]);
        }
    }
};

template <typename T, int kHeadDim, bool kFactored>
__global__ void __launch_bounds__(Sm90BwdDpairTile<kHeadDim>::kThreads, 1)
    evoformer_sm90_bwd_dpair_kernel(const __grid_constant__ Sm90Params p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Tile = Sm90BwdDpairTile<kHeadDim>;
    using Rows = RowTile<kHeadDim>;
    constexpr bool kInRegisters = !kFactored && Tile::kBiasInRegisters;
    const int warp = warp_uniform(static_cast<int>(threadIdx.x / 32)), lane = threadIdx.x % 32;
    DpairBlock its = DpairBlock::of(p, blockIdx.x);
    const int first = static_cast<int64_t>(p.rows_per_group) * its.split / p.dpair_splits;
    const int last = static_cast<int64_t>(p.rows_per_group) * (its.split + 1) / p.dpair_splits;

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
    if (!kFactored && p.redo != nullptr && p.redo[1 + blockIdx.x] == 0) return;
    block_sync();

    if (warp >= Tile::kConsumerWarps) {
        release_registers<Tile::kProducerRegisters>();
        if (warp != Tile::kConsumerWarps || lane != 0) return;
        mbarrier_arrive_expect(bias_barrier, 4 * kBiasTileBytes);
        for (int i = 0; i < 4; ++i)
            tma_load(Tile::kBiasOffset + i * kBiasTileBytes, &p.pair_map, bias_barrier, its.key0 + i / 2 * kTileRows,
                     its.q0 + i % 2 * kTileRows, p.pair_heads == 1 ? 0 : its.head, p.pair_batch == 1 ? 0 : its.group);
        for (int n = first; n < last; ++n) {
            const RowLocation row = RowLocation::of(p, its.group, n);
            const int64_t stat = row.head_row(p, its.head) * p.q_len_padded + its.q0;
            const uint32_t stage = kSmemBase + ring.stage * Tile::kStageBytes, barrier = ring.full();
            ring.wait_empty();
            ring.announce(Tile::kStageBytes);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int q = its.q0 + half * kTileRows, key = its.key0 + half * kTileRows;
                const uint32_t tile = stage + half * Tile::kTileBytes;
                tma_load(tile + Tile::kQueryOffset, &p.q_map, barrier, 0, q, its.head, row.n, row.b);
                tma_load(tile + Tile::kDOOffset, &p.d_o_map, barrier, 0, q, its.head, row.n, row.b);
                tma_load(tile + Tile::kKeyOffset, &p.k_map, barrier, 0, key, its.head, row.n, row.b);
                tma_load(tile + Tile::kValueOffset, &p.v_map, barrier, 0, key, its.head, row.n, row.b);
            }
            bulk_load(stage + Tile::kQueryAuxOffset, p.query_aux + stat, 2 * kAuxTileBytes, barrier);
            bulk_load(stage + Tile::kKeyAuxOffset, p.key_aux + p.key_row(row.b, row.n) * p.k_len_padded + its.key0,
                      2 * kAuxTileBytes, barrier);
            ring.advance();
        }
    } else {
        take_registers<Tile::kConsumerRegisters>();
        const int warpgroup = warp / 4, q_half = warpgroup % 2, key_half = warpgroup / 2;
        const int pair = lane & 3, query = DpairLane::of(warp * 32 + lane).query;
        const float scale_log2 = p.softmax_scale * kBiasLog2E<T>;
        const MatrixOperand query_tiles = Rows::over_dim(kSmemBase + Tile::kQueryOffset + q_half * Tile::kTileBytes);
        const MatrixOperand key_tiles = Rows::over_dim(kSmemBase + Tile::kKeyOffset + key_half * Tile::kTileBytes);
        const MatrixOperand aux_tiles = aux_operand(kSmemBase + Tile::kKeyAuxOffset + key_half * kAuxTileBytes);
        const uint32_t query_aux = kept(kSmemBase + Tile::kQueryAuxOffset + query * 16 + pair * 4);
        // 32 keys at a time: S and dP of 64 would not fit beside the sums and the bias.
        constexpr int kParts = kFactored ? 1 : 2, kTiles = 8 / kParts;
        float sum[8][4];
        zero_bias(sum);
        DpairBias<T> bias;
        float biased[kInRegisters ? 8 : 4][4];
        if constexpr (!kFactored) {
            bias = DpairBias<T>::of(p, its, Tile::kBiasOffset, warp * 32 + lane);
            bias.address = kept(bias.address);
            mbarrier_wait(bias_barrier, 0);
        }
        if constexpr (kInRegisters) {
#pragma unroll
            for (int i = 0; i < 4; ++i) bias.read(biased[2 * i], biased[2 * i + 1], i * 32);
        }
        // Where registers are scarce, shared memory keeps their number.
        constexpr bool kScarce = kInRegisters || kFactored;
        for (int n = first; n < (kScarce ? static_cast<int>(lds_u32(Tile::kLastOffset)) : last); ++n) {
            const uint32_t offset = ring.stage * Tile::kStageBytes;
            ring.wait_full();
            const uint32_t low = lds_u32(query_aux + offset), high = lds_u32(query_aux + offset + 128);
            const AuxOperand s_aux = AuxOperand::of_s(low, high, pair), dp_aux = AuxOperand::of_dp(low, high, pair);
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const MatrixOperand queries = query_tiles.plus(offset);
                const MatrixOperand keys = key_tiles.plus(offset + part * Tile::kTileBytes / 2);
                const MatrixOperand key_aux = aux_tiles.plus(offset + part * kAuxTileBytes / 2);
                float s[kTiles][4], dp[kTiles][4];
                wgmma_fence();
                Rows::template product_abt<T>(s, queries, keys);
                wgmma_rs<bf16, false>(s, s_aux.words, key_aux);
                wgmma_commit();
                Rows::template product_abt<T>(dp, queries.plus(Tile::kDOOffset - Tile::kQueryOffset),
                                              keys.plus(Tile::kValueOffset - Tile::kKeyOffset));
                wgmma_rs<bf16, false>(dp, dp_aux.words, key_aux);
                wgmma_commit();
                if constexpr (!kInRegisters && !kFactored) {  // worked out while the products run
#pragma unroll
                    for (int i = 0; i < 2; ++i) bias.read(biased[2 * i], biased[2 * i + 1], part * 64 + i * 32);
                }
                wgmma_wait<1>();
                wgmma_complete(s);
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        s[j][e] = exp2_approx(
                            kFactored ? s[j][e] * scale_log2
                                      : fmaf(s[j][e], scale_log2, biased[kInRegisters ? part * 4 + j : j][e]));
                }
                wgmma_wait<0>();
                wgmma_complete(dp);
                if (part == kParts - 1) mbarrier_arrive_if(ring.empty(), lane == 0);
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        sum[part * kTiles + j][e] = fmaf(s[j][e], dp[j][e], sum[part * kTiles + j][e]);
                }
            }
            ring.advance();
        }
        // Worked out again: registers keep nothing through the loop that its end alone needs.
        const int block = opaque(blockIdx.x), thread = opaque(threadIdx.x);
        its = DpairBlock::of(p, block);
        const auto [its_query, its_key] = DpairLane::of(thread);
        if constexpr (kFactored) {
            bias = DpairBias<T>::of(p, its, Tile::kBiasOffset, thread);
            mbarrier_wait(bias_barrier, 0);
            bool in_range = true;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                bias.read(biased[0], biased[1], i * 32);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float& x = sum[2 * i + j][e];
                        in_range = in_range && fabsf(x) < INFINITY;
                        // By its root twice: the power alone may be less than fp32 has where the product is not.
                        const float root = exp2_approx(0.5f * biased[j][e]);
                        x = x * root * root;
                    }
                }
            }
            if (!in_range) p.redo[1 + block] = 1;
        }
        store_dpair_share<T>(p, its.split, its.group, its.head, its.q0 + its_query, its.key0 + its_key, sum);
    }
}

}  // namespace ds4sci

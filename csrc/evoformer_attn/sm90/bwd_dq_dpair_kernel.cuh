// SPDX-License-Identifier: Apache-2.0
// dQ and d(pair_bias) at once on Hopper: S, P and dP of both are the same. As in bwd_dpair_kernel.cuh a block owns 128
// queries x 128 keys of one head and keeps the sum of dS over its rows in registers. The blocks that share the queries
// form a cluster, and each has the part of dQ that its keys give: they send their parts through distributed shared
// memory to the blocks that own them, which add them up in the blocks' order. Every sum has one order, the same in
// every run.
#pragma once
#include "bias.h"
#include "finish_kernel.cuh"
#include "sm90/tile_config.h"

namespace ds4sci {

// Who adds up which part of 128 x kHeadDim sums in a cluster. The accumulators of each thread of the warpgroup that
// has them are cut into pieces of kWords; a block owns neighbouring pieces of every thread.
template <int kHeadDim, int kBlocks>
struct SumOwners {
    static constexpr int kWords = kBlocks == 6 ? 2 : 4;  // pieces of four would divide too unevenly by six
    static constexpr int kPieces = kHeadDim / kWords, kPieceBytes = 128 * 4 * kWords;
    static constexpr int kMost = ceil_div(kPieces, kBlocks);  // pieces of one block
    static constexpr int kAtOnce = kMost > 2 ? 2 : kMost;     // added up; more would not fit the registers

    static DS4SCI_HOST_DEVICE constexpr int owner(int piece) { return piece * kBlocks / kPieces; }
    static DS4SCI_HOST_DEVICE constexpr int first(int block) { return ceil_div(block * kPieces, kBlocks); }
    static_assert(kPieces >= kBlocks, "a block that waits for nothing would wait forever");
    static_assert(kMost * kBlocks * kPieceBytes <= Sm90BwdDqDpairTile<kHeadDim>::kReceivedBytes, "no room");
};

template <typename T, int kHeadDim, int kBlocks>
__global__ void __launch_bounds__(Sm90BwdDqDpairTile<kHeadDim>::kThreads, 1)
    evoformer_sm90_bwd_dq_dpair_kernel(const __grid_constant__ Sm90Params p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Tile = Sm90BwdDqDpairTile<kHeadDim>;
    using Stage = typename Tile::Stage;
    using Rows = RowTile<kHeadDim>;
    using DsRows = RowTile<32>;
    using Owners = SumOwners<kHeadDim, kBlocks>;
    const int warp = warp_uniform(static_cast<int>(threadIdx.x / 32)), lane = threadIdx.x % 32;
    const int rank = blockIdx.y;
    const uint32_t window = kept(cluster_window(smem_base));
    // Barriers: stages filled; of two rows each: sums received, and read by all blocks; dS.
    const uint32_t full = window + Tile::kBarrierOffset, received = full + Tile::kStages * 8, credit = received + 16;
    Ring<Tile::kDsSlots> ds_ring{credit + 16};
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::kStages; ++i) mbarrier_init(full + i * 8, Tile::kReducerWarps);
        for (int i = 0; i < 4; ++i) mbarrier_init(received + i * 8, 1);
        ds_ring.init(ds_ring.barriers, Tile::kReducerWarps, Tile::kConsumerWarps);
        mbarrier_init_fence();
    }
    wait_for_previous_kernels();
    let_next_kernel_start();
    cluster_sync();

    uint32_t block = blockIdx.x;
    const int key0 = rank * Tile::kPositions;
    const int num_q_blocks = ceil_div(p.q_len, Tile::kPositions);
    const int q0 = block % num_q_blocks * Tile::kPositions;
    block /= num_q_blocks;
    const int head = block % p.heads;
    block /= p.heads;
    const int group = block % p.num_groups, split = block / p.num_groups;
    const int first = static_cast<int64_t>(p.rows_per_group) * split / p.dpair_splits;
    const int num_rows = static_cast<int64_t>(p.rows_per_group) * (split + 1) / p.dpair_splits - first;

    if (warp >= Tile::kConsumerWarps) {
        release_registers<Tile::kReducerRegisters>();
        const int thread = threadIdx.x - Tile::kConsumerWarps * 32, own_warp = warp - Tile::kConsumerWarps;
        const int quad = lane >> 2, pair = lane & 3;
        const int own_first = Owners::first(rank), own_pieces = Owners::first(rank + 1) - own_first;
        const uint32_t received_bytes = own_pieces * kBlocks * Owners::kPieceBytes;
        // Where the pieces of this thread go: its own part of the place in a row's dQ, then that of the piece, the
        // same for all threads; and which pairs of elements exist there, a bit each.
        const int position_elements = p.heads * p.head_dim, query = own_warp * 16 + quad, dim = pair * 2;
        T* out = RowLocation::of(p, group, first).template out<T>(p, p.dq, p.q_len, head) +
                 static_cast<int64_t>(q0 + query) * position_elements + dim;
        auto query_of = [&](int own) {
            const int element = (own_first + own) * Owners::kWords;  // of a thread's accumulators
            return element / (kHeadDim / 2) * kTileRows + element / 2 % 2 * 8;
        };
        auto dim_of = [&](int own) { return (own_first + own) * Owners::kWords / 4 % (kHeadDim / 8) * 8; };
        uint32_t exists = 0;
#pragma unroll
        for (int own = 0; own < Owners::kMost; ++own) {
#pragma unroll
            for (int e = 0; e < Owners::kWords / 2; ++e) {
                if (own < own_pieces && q0 + query + query_of(own) + e * 8 < p.q_len && dim + dim_of(own) < p.head_dim)
                    exists |= 1u << (own * Owners::kWords / 2 + e);
            }
        }

        // One thread of each warp copies a quarter of a row's operands: Q, dO, K and V; with Q and K their sides of
        // the auxiliary product.
        const bool of_keys = own_warp >= 2, with_aux = own_warp % 2 == 0;
        const CUtensorMap* map = own_warp == 0   ? &p.q_map
                                 : own_warp == 1 ? &p.d_o_map
                                 : own_warp == 2 ? &p.k_map
                                                 : &p.v_map;
        const uint32_t tile_offset = own_warp * 2 * Tile::kTileBytes;
        static_assert(Stage::kDOOffset == 2 * Tile::kTileBytes && Stage::kKeyOffset == 4 * Tile::kTileBytes &&
                          Stage::kValueOffset == 6 * Tile::kTileBytes,
                      "in this order");
        const uint32_t aux_offset = of_keys ? Stage::kKeyAuxOffset : Stage::kQueryAuxOffset;
        const int position = of_keys ? key0 : q0;
        RowLocation next_row = RowLocation::of(p, group, first);
        auto load = [&](int stage_index) {
            const uint32_t stage = window + kSmemBase + stage_index * Stage::kStageBytes,
                           barrier = full + stage_index * 8, tile = stage + tile_offset;
            mbarrier_arrive_expect(barrier, 2 * Tile::kTileBytes + (with_aux ? 2 * kAuxTileBytes : 0));
            tma_load(tile, map, barrier, 0, position, head, next_row.n, next_row.b);
            tma_load(tile + Tile::kTileBytes, map, barrier, 0, position + kTileRows, head, next_row.n, next_row.b);
            if (with_aux) {
                const uint4* aux = of_keys ? p.key_aux + p.key_row(next_row.b, next_row.n) * p.k_len_padded
                                           : p.query_aux + next_row.head_row(p, head) * p.q_len_padded;
                bulk_load(stage + aux_offset, aux + position, 2 * kAuxTileBytes, barrier);
            }
            next_row.advance(p);
        };
        constexpr uint32_t kCreditBytes = kBlocks * Tile::kReducerWarps * 4;
        if (thread == 0) {
            for (int i = 0; i < 2; ++i) {
                mbarrier_arrive_expect(received + i * 8, received_bytes);
                mbarrier_arrive_expect(credit + i * 8, kCreditBytes);
            }
        }
        if (lane == 0) {
            for (int i = 0; i < Tile::kStages && i < num_rows; ++i) load(i);
        }
        // Adds up the sums received of the i-th row and writes them.
        auto reduce = [&](int i) {
            const int buffer = i % 2;
            mbarrier_wait(received + buffer * 8, i / 2 % 2);
            mbarrier_arrive_expect_if(received + buffer * 8, received_bytes, thread == 0);
            const uint32_t source =
                window + Tile::kReceivedOffset + buffer * Tile::kReceivedBytes + thread * 4 * Owners::kWords;
#pragma unroll Owners::kAtOnce
            for (int own = 0; own < Owners::kMost; ++own) {
                float sum[Owners::kWords] = {};
#pragma unroll
                for (int from = 0; from < kBlocks; ++from) {
                    const uint32_t address = source + (from * Owners::kMost + own) * Owners::kPieceBytes;
                    if constexpr (Owners::kWords == 4) {
                        const float4 x = lds_f32x4(address);
                        sum[0] += x.x;
                        sum[1] += x.y;
                        sum[2] += x.z;
                        sum[3] += x.w;
                    } else {
                        const float2 x = lds_f32x2(address);
                        sum[0] += x.x;
                        sum[1] += x.y;
                    }
                }
#pragma unroll
                for (int e = 0; e < Owners::kWords / 2; ++e)
                    store_global_if(out + (query_of(own) + e * 8) * position_elements + dim_of(own),
                                    pack2<T>(sum[2 * e] * p.softmax_scale, sum[2 * e + 1] * p.softmax_scale),
                                    exists >> (own * Owners::kWords / 2 + e) & 1);
            }
            out += static_cast<int64_t>(p.q_len) * position_elements;
            warp_sync();
            // Tell all blocks that this warp has read what they sent. Nobody waits for the last two rows'.
            const int block = lane < kBlocks ? lane : 0;
            cluster_store_if(cluster_address(window + Tile::kCreditOffset + (buffer * 8 + rank) * 4, block), 0u,
                             cluster_address(credit + buffer * 8, block), lane < kBlocks && i + 2 < num_rows);
        };
        int stage = 0;
        uint32_t phase = 0;
        for (int i = 0; i < num_rows; ++i) {
            const int buffer = i % 2;
            float dq[2][kHeadDim / 8][4];
            zero_bias(dq[0]);
            zero_bias(dq[1]);
            const uint32_t keys = kSmemBase + stage * Stage::kStageBytes + Stage::kKeyOffset;
            mbarrier_wait(full + stage * 8, phase);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                const uint32_t ds = Tile::kDsOffset + ds_ring.stage * Tile::kDsSlotBytes;
                ds_ring.wait_full();
                wgmma_fence();
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) {
                    const MatrixOperand scores = DsRows::over_dim(ds + tile * Tile::kDsTileBytes);
                    const MatrixOperand key_tile =
                        Rows::over_positions(keys + part * Tile::kTileBytes + tile / 2 * Tile::kTileBytes / 2);
#pragma unroll
                    for (int step = 0; step < 2; ++step)
                        wgmma_ss<T, true, true>(dq[tile % 2], scores.plus(step * DsRows::kDimStep),
                                                key_tile.plus(step * Rows::kPositionStep));
                }
                wgmma_commit();
                // Beside the product: a row whose sums are there by now.
                if (part == 0 && i >= 2) reduce(i - 2);
                wgmma_wait<0>();
                wgmma_complete(dq[0]);
                wgmma_complete(dq[1]);
                mbarrier_arrive_if(ds_ring.empty(), lane == 0);
                ds_ring.advance();
            }
            if (i >= 2) {
                mbarrier_wait(credit + buffer * 8, (i / 2 - 1) % 2);
                mbarrier_arrive_expect_if(credit + buffer * 8, kCreditBytes, thread == 0);
            }
            const uint32_t destination = window + Tile::kReceivedOffset + buffer * Tile::kReceivedBytes +
                                         rank * Owners::kMost * Owners::kPieceBytes + thread * 4 * Owners::kWords;
#pragma unroll
            for (int piece = 0; piece < Owners::kPieces; ++piece) {
                constexpr int kPerTile = 4 / Owners::kWords;
                const int owner = Owners::owner(piece), tile = piece / kPerTile, e = piece % kPerTile * 2;
                float x[Owners::kWords];
#pragma unroll
                for (int word = 0; word < Owners::kWords; ++word)
                    x[word] = dq[tile / (kHeadDim / 8)][tile % (kHeadDim / 8)][e + word];
                cluster_store(
                    cluster_address(destination, owner) + (piece - Owners::first(owner)) * Owners::kPieceBytes, x,
                    cluster_address(received + buffer * 8, owner));
            }
            // All have read this row's operands: the other warpgroups before they passed on its last dS.
            named_barrier_sync(1, 128);
            if (lane == 0 && i + Tile::kStages < num_rows) load(stage);
            if (++stage == Tile::kStages) {
                stage = 0;
                phase ^= 1;
            }
        }
        if (num_rows > 1) reduce(num_rows - 2);
        if (num_rows > 0) reduce(num_rows - 1);
    } else {
        take_registers<Tile::kConsumerRegisters>();
        const int q_half = warp / 4, warp_row = warp % 4 * 16;
        const int quad = lane >> 2, pair = lane & 3;
        const float scale_log2 = p.softmax_scale * kBiasLog2E<T>;
        const int q = q_half * kTileRows + warp_row + quad;  // within the block: this lane's first query, then + 8
        const int key = key0 + pair * 2;                     // this lane's first key, then + 1 and + 8 each
        const float* refs = pair_row(p, p.pair_ref, {0, 0, head, group}) + q0 + q;
        const float ref[2] = {refs[0], refs[8]};
        // Two keys of the pair bias per word, 32 keys' words in a row: rows quad and quad + 8 of keys 8 j on.
        const T* pair_bias = static_cast<const T*>(p.pair_bias) + pair_offset(p, group, head) + key;
        auto bias_words = [&](int chunk, int i) {
            const int row = q0 + q + i % 2 * 8, column = chunk * 32 + i / 2 * 8, keys = p.k_len - key - column;
            if (row >= p.q_len || keys <= 0) return 0u;
            const uint32_t word = *reinterpret_cast<const uint32_t*>(pair_bias + row * p.pair_stride_q + column);
            return keys == 1 ? word & 0xffffu : word;  // what lies behind the last key may be anything
        };
        uint32_t bias[3][8];
        const uint32_t last_bias = window + Tile::kBiasOffset + threadIdx.x * 16;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int chunk = 0; chunk < 3; ++chunk) bias[chunk][i] = bias_words(chunk, i);
            sts_u32(last_bias + i / 4 * Tile::kBiasChunkBytes + i % 4 * 4, bias_words(3, i));
        }
        const uint32_t query_fragment =
            kept(Rows::fragment(window + kSmemBase + Stage::kQueryOffset + q_half * Tile::kTileBytes, warp_row, lane));
        const uint32_t query_aux = kept(window + kSmemBase + Stage::kQueryAuxOffset + q * 16 + pair * 4);
        const uint32_t ds_address =
            kept(DsRows::fragment(window + Tile::kDsOffset + q_half * Tile::kDsTileBytes, warp_row, lane));
        const MatrixOperand key_tiles = Rows::over_dim(kSmemBase + Stage::kKeyOffset);
        const MatrixOperand aux_tiles = aux_operand(kSmemBase + Stage::kKeyAuxOffset);
        const int valid_keys = p.k_len - key0;
        float sum[16][4];
        zero_bias(sum);
        // Of a row: its queries and their dO as operands, with their sides of the auxiliary products.
        uint32_t queries[kHeadDim / 16][4], d_o[kHeadDim / 16][4];
        AuxOperand s_aux, dp_aux;
        auto load_queries = [&](int stage) {
            const uint32_t offset = stage * Stage::kStageBytes;
#pragma unroll
            for (int step = 0; step < kHeadDim / 16; ++step)
                ldmatrix_x4(queries[step], (query_fragment + offset) ^ (step * 32));
            s_aux = AuxOperand::of_s(lds_u32(query_aux + offset), lds_u32(query_aux + offset + 128), pair);
        };
        auto load_d_o = [&](int stage) {
            const uint32_t offset = stage * Stage::kStageBytes;
#pragma unroll
            for (int step = 0; step < kHeadDim / 16; ++step)
                ldmatrix_x4(d_o[step],
                            (query_fragment + offset + Stage::kDOOffset - Stage::kQueryOffset) ^ (step * 32));
            dp_aux = AuxOperand::of_dp(lds_u32(query_aux + offset), lds_u32(query_aux + offset + 128), pair);
        };
        // 32 keys at a time: S of the next ones beside the exponentials of these, dP as soon as its registers are
        // free.
        float s[2][4][4], dp[4][4];
        auto start_product = [&](float (&d)[4][4], const uint32_t (&a)[kHeadDim / 16][4], const AuxOperand& aux,
                                 uint32_t of_b, int chunk, int stage) {
            const MatrixOperand b = key_tiles.plus(stage * Stage::kStageBytes + of_b + chunk * Tile::kTileBytes / 2);
            wgmma_fence();
            wgmma_rs<T, false, false>(d, a[0], b);
#pragma unroll
            for (int step = 1; step < kHeadDim / 16; ++step)
                wgmma_rs<T, false>(d, a[step], b.plus(step * Rows::kDimStep));
            wgmma_rs<bf16, false>(d, aux.words,
                                  aux_tiles.plus(stage * Stage::kStageBytes + chunk * kAuxTileBytes / 2));
            wgmma_commit();
        };
        auto start_s = [&](int chunk, int stage) { start_product(s[chunk % 2], queries, s_aux, 0, chunk, stage); };
        auto start_dp = [&](int chunk, int stage) {
            start_product(dp, d_o, dp_aux, Stage::kValueOffset - Stage::kKeyOffset, chunk, stage);
        };
        int stage = 0;
        uint32_t phase = 0;
        mbarrier_wait(full, 0);
        load_queries(0);
        load_d_o(0);
        start_s(0, 0);
        start_dp(0, 0);
        wgmma_wait<0>();
        wgmma_complete(s[0]);
        wgmma_complete(dp);
        for (int left = num_rows; left > 0; --left) {
#pragma unroll
            for (int chunk = 0; chunk < 4; ++chunk) {
                float (&x)[4][4] = s[chunk % 2];
                if (chunk > 0) {
                    wgmma_wait<1>();
                    wgmma_complete(x);
                }
                if (chunk < 3) {
                    start_s(chunk + 1, stage);
                } else {
                    // The last row's is computed again, and nobody reads it: a product under a condition would
                    // serialise all.
                    const bool wraps = stage + 1 == Tile::kStages;
                    phase ^= left > 1 && wraps ? 1 : 0;
                    stage = left > 1 ? wraps ? 0 : stage + 1 : stage;
                    mbarrier_wait(full + stage * 8, phase);
                    load_queries(stage);
                    start_s(0, stage);
                }
                // The mask drops keys past the end, but their bias reads as zero, which may be 1e38 above the row's.
                if (valid_keys < Tile::kPositions) drop_columns(x, valid_keys - chunk * 32, lane);
                uint4 last{};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    if (chunk == 3 && j % 2 == 0) last = lds_u32x4(last_bias + j / 2 * Tile::kBiasChunkBytes);
                    const uint32_t low = chunk < 3    ? bias[chunk % 3][2 * j]
                                         : j % 2 == 0 ? last.x
                                                      : last.z,
                                   high = chunk < 3    ? bias[chunk % 3][2 * j + 1]
                                          : j % 2 == 0 ? last.y
                                                       : last.w;
                    const float2 low_bias = unpack2<T>(low), high_bias = unpack2<T>(high);
                    const float b[4] = {low_bias.x, low_bias.y, high_bias.x, high_bias.y};
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        x[j][e] = exp2_approx(fmaf(x[j][e], scale_log2, fmaf(b[e], kBiasLog2E<T>, -ref[e / 2])));
                }
                if (chunk > 0) {
                    wgmma_wait<1>();
                    wgmma_complete(dp);
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        x[j][e] *= dp[j][e];
                        sum[chunk * 4 + j][e] += x[j][e];
                    }
                }
                if (chunk == 3) load_d_o(stage);
                start_dp((chunk + 1) % 4, stage);
                if (chunk % 2 == 0) ds_ring.wait_empty();
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    uint32_t packed[4];
                    pack_operand<T>(packed, x[2 * i], x[2 * i + 1]);
                    stmatrix_x4(
                        (ds_address + ds_ring.stage * Tile::kDsSlotBytes + chunk % 2 * 2 * Tile::kDsTileBytes) ^
                            (i * 32),
                        packed);
                }
                if (chunk % 2 == 1) {
                    async_proxy_fence();
                    warp_sync();
                    mbarrier_arrive_if(ds_ring.full(), lane == 0);
                    ds_ring.advance();
                }
            }
            // Not in flight from one turn of the loop to the next, or the compiler serialises all products.
            wgmma_wait<0>();
            wgmma_complete(s[0]);
            wgmma_complete(dp);
        }
        store_dpair_share<T>(p, split, group, head, q0 + q, key, sum);
    }
}

}  // namespace ds4sci

// SPDX-License-Identifier: Apache-2.0
// dQ = scale * dS K on Hopper. A warpgroup owns 128 queries of one row and runs over keys; S and dP are recomputed.
#pragma once
#include "bias.h"
#include "sm90/key_stage.cuh"

namespace ds4sci {

template <typename T, int kHeadDim, bool kPair>
__global__ void __launch_bounds__(Sm90BwdDqTile<kHeadDim, kPair>::kThreads, 1)
    evoformer_sm90_bwd_dq_kernel(const __grid_constant__ Sm90Params p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Tile = Sm90BwdDqTile<kHeadDim, kPair>;
    using Rows = RowTile<kHeadDim>;
    const int warp = warp_uniform(static_cast<int>(threadIdx.x / 32)), lane = threadIdx.x % 32;
    Tile::init(smem_base, p.follows_prepare);
    auto ring = Tile::ring();

    const int num_q_blocks = ceil_div(p.q_len, Tile::kPositions), num_k_tiles = ceil_div(p.k_len, kTileRows);
    const int num_row_blocks = ceil_div(p.rows_per_group, Tile::kRows);

    if (warp >= Tile::kConsumerWarps) {
        release_registers<Tile::kProducerRegisters>();
        if (warp != Tile::kConsumerWarps || lane != 0) return;
        typename Tile::OwnRing queries = Tile::own_ring(0);  // those of all warpgroups move together
        for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
            const WorkItem item = decode_work_item(index, num_q_blocks, num_row_blocks, p);
            const int q0 = item.tile * Tile::kPositions;
            RowLocation rows[Tile::kRows];
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r) {
                rows[r] = RowLocation::of(p, item.group, item.row_block * Tile::kRows + r);
                const RowCoordinates at = RowCoordinates::of(p, rows[r]);
                queries.barriers = Tile::own_ring(r).barriers;
                queries.wait_empty();
                ItemRecord record{};
                record.stats = rows[r].head_row(p, item.head) * p.q_len_padded + q0;
                record.source = kPair ? pair_row(p, p.pair_ref, item) + q0 : nullptr;
                record.first = q0, record.head = item.head, record.n = at.n, record.b = at.b;
                store_record(Tile::record(r, queries.stage), record);
                queries.announce(Tile::kOwnBytes);
                const uint32_t tile = Tile::own_tiles(r, queries.stage);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int q = q0 + half * kTileRows;
                    tma_load(tile + half * Tile::kTileBytes, &p.q_map, queries.full(), 0, q, item.head, at.n, at.b);
                    tma_load(tile + (2 + half) * Tile::kTileBytes, &p.d_o_map, queries.full(), 0, q, item.head, at.n,
                             at.b);
                }
            }
            queries.advance();
            const int pair_head = p.pair_heads == 1 ? 0 : item.head, pair_group = p.pair_batch == 1 ? 0 : item.group;
            for (int k_tile = 0; k_tile < num_k_tiles; ++k_tile) {
                ring.wait_empty();
                ring.announce(Tile::kStageBytes);
                load_key_stage<Tile>(p, Tile::stage(ring.stage), ring.full(), rows, k_tile * kTileRows, q0, item.head,
                                     pair_head, pair_group);
                ring.advance();
            }
        }
        // So that this kernel's end is the end of those before it, too.
        wait_for_previous_kernels();
    } else {
        take_registers<Tile::kConsumerRegisters>();
        const int warpgroup = warp / 4, warp_row = warp % 4 * 16;
        const int quad = lane >> 2, pair = lane & 3;
        const float scale_log2 = p.softmax_scale * kBiasLog2E<T>;
        // Of the four blocks of bias terms, how many are worked out while the products run: two warpgroups gain by
        // it, three lose.
        constexpr int kEarlyTerms = kHeadDim == 64 ? 4 : 0;
        const MatrixOperand query_tiles = Rows::over_dim(Tile::own_tiles(warpgroup, 0));
        const MatrixOperand key_tiles = Rows::over_dim(Tile::key_tile(kSmemBase, warpgroup));
        const MatrixOperand value_tiles = Rows::over_dim(Tile::value_tile(kSmemBase, warpgroup));
        const MatrixOperand summed_key_tiles = Rows::over_positions(Tile::key_tile(kSmemBase, warpgroup));
        const MatrixOperand aux_tiles = aux_operand(Tile::aux_tile(kSmemBase, warpgroup));
        const uint32_t bias_tiles = kept(kSmemBase + bias_fragment(warp_row, lane));
        typename Tile::OwnRing queries = Tile::own_ring(warpgroup);

        // What a lane knows of its queries: tile, then row quad or quad + 8.
        struct QueryStats {
            float ref[2][2];
            uint32_t aux[2][2];
        } stats{};
        // Of the work item whose operands are there.
        auto load_stats = [&] {
            const ItemRecord record = load_record<ItemRecord>(Tile::record(warpgroup, queries.stage));
            const int first = warp_row + quad;
            const float* refs = static_cast<const float*>(record.source) + first;
            const uint32_t* aux = reinterpret_cast<const uint32_t*>(p.query_aux + record.stats + first) + pair;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int offset = i / 2 * kTileRows + i % 2 * 8;
                if (kPair) stats.ref[i / 2][i % 2] = refs[offset];
                stats.aux[i / 2][i % 2] = aux[offset * 4];
            }
        };
        if (blockIdx.x < p.num_items) {
            queries.wait_full();
            load_stats();
        }

        for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
            float dq[2][kHeadDim / 8][4];
            zero_bias(dq[0]);
            zero_bias(dq[1]);
            const MatrixOperand query_tile = query_tiles.plus(queries.stage * Tile::kBufferBytes);
            const MatrixOperand d_o_tile = query_tile.plus(2 * Tile::kTileBytes);
            uint32_t finished_stage = 0;  // its keys are read until the next wait
            for (int k_tile = 0; k_tile < num_k_tiles; ++k_tile) {
                const uint32_t offset = ring.stage * Tile::kStageBytes;
                ring.wait_full();
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float s[8][4], dp[8][4];
                    const AuxOperand s_aux = AuxOperand::of_s(stats.aux[half][0], stats.aux[half][1], pair);
                    const AuxOperand dp_aux = AuxOperand::of_dp(stats.aux[half][0], stats.aux[half][1], pair);
                    wgmma_fence();
                    Rows::template product_abt<T>(s, query_tile.plus(half * Tile::kTileBytes), key_tiles.plus(offset));
                    wgmma_rs<bf16, false>(s, s_aux.words, aux_tiles.plus(offset));
                    wgmma_commit();
                    Rows::template product_abt<T>(dp, d_o_tile.plus(half * Tile::kTileBytes),
                                                  value_tiles.plus(offset));
                    wgmma_rs<bf16, false>(dp, dp_aux.words, aux_tiles.plus(offset));
                    wgmma_commit();
                    // What the bias adds to the logits of 16 keys.
                    auto bias_terms = [&](float (&terms)[2][4], int i) {
                        uint32_t bias[4];
                        ldmatrix_x4(bias, (bias_tiles + offset + half * kBiasTileBytes) ^ (i * 32));
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            const float2 low = unpack2<T>(bias[2 * j]), high = unpack2<T>(bias[2 * j + 1]);
                            const float b[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
                            for (int e = 0; e < 4; ++e)
                                terms[j][e] = fmaf(b[e], kBiasLog2E<T>, -stats.ref[half][e / 2]);
                        }
                    };
                    float terms[4][2][4];
                    if (kPair) {
#pragma unroll
                        for (int i = 0; i < kEarlyTerms; ++i) bias_terms(terms[i], i);
                    }
                    wgmma_wait<1>();
                    wgmma_complete(s);
                    if (half == 0) mbarrier_arrive_if(finished_stage, k_tile > 0 && lane == 0);
                    // The mask drops keys past the end, but their bias reads as zero, which may be 1e38 above the
                    // row's.
                    if (kPair && p.k_len - k_tile * kTileRows < kTileRows)
                        drop_columns(s, p.k_len - k_tile * kTileRows, lane);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (kPair && i >= kEarlyTerms) bias_terms(terms[i], i);
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            float (&x)[4] = s[2 * i + j];
#pragma unroll
                            for (int e = 0; e < 4; ++e)
                                x[e] = exp2_approx(kPair ? fmaf(x[e], scale_log2, terms[i][j][e]) : x[e] * scale_log2);
                        }
                    }
                    wgmma_wait<0>();
                    wgmma_complete(dp);
                    wgmma_complete(dq[0]);
                    wgmma_complete(dq[1]);
                    uint32_t packed[4][4];
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) s[j][e] *= dp[j][e];
                    }
#pragma unroll
                    for (int i = 0; i < 4; ++i) pack_operand<T>(packed[i], s[2 * i], s[2 * i + 1]);
                    wgmma_fence();
                    Rows::template product_pb<T>(dq[half], packed, summed_key_tiles.plus(offset));
                    wgmma_commit();
                }
                finished_stage = ring.empty();
                ring.advance();
            }
            const ItemRecord record = load_record<ItemRecord>(Tile::record(warpgroup, queries.stage));
            const auto own = queries;
            queries.advance();
            // With two buffers the next operands are most likely there, and the loads run beside the stores.
            const bool more = index + gridDim.x < p.num_items;
            if (Tile::kOwnBuffers > 1 && more) {
                queries.wait_full();
                load_stats();
            }
            wgmma_wait<0>();
            wgmma_complete(dq[0]);
            wgmma_complete(dq[1]);
            mbarrier_arrive_if(finished_stage, lane == 0);
            // The queries are read by all warps of the warpgroup: their tiles take the result.
            named_barrier_sync(1 + warpgroup, 128);
            const uint32_t staged = Tile::own_tiles(warpgroup, own.stage);
#pragma unroll
            for (int half = 0; half < 2; ++half)
                stage_rows<T, kHeadDim>(Rows::fragment(staged + half * Tile::kTileBytes, warp_row, lane), dq[half],
                                        p.softmax_scale, p.softmax_scale);
            start_query_stores<Rows>(p.dq_map, staged, warp_row, record, lane);
            tma_store_wait_read();
            mbarrier_arrive(own.empty());
            if (Tile::kOwnBuffers == 1 && more) {
                queries.wait_full();
                load_stats();
            }
        }
    }
}

}  // namespace ds4sci

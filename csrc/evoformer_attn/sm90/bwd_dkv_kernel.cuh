// SPDX-License-Identifier: Apache-2.0
// dV = P^T dO, dK = scale * dS^T Q and d(mask_bias) per head = sum of dS over queries, on Hopper. A warpgroup owns 64
// keys of one row and runs over queries in order. The products are transposed, S^T = K Q^T and dP^T = V dO^T, so that
// P^T and dS^T come out as first operands of the next ones.
#pragma once
#include "bias.h"
#include "sm90/key_rows.cuh"

namespace ds4sci {

template <typename T, int kHeadDim, bool kPair>
__global__ void __launch_bounds__(Sm90BwdDkvTile<kHeadDim, kPair>::kThreads, 1)
    evoformer_sm90_bwd_dkv_kernel(const __grid_constant__ Sm90Params p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Tile = Sm90BwdDkvTile<kHeadDim, kPair>;
    using Rows = RowTile<kHeadDim>;
    static_assert(Tile::kOwnBuffers > 1, "a buffer is handed back when the next item's operands are there");
    const int warp = warp_uniform(static_cast<int>(threadIdx.x / 32)), lane = threadIdx.x % 32;
    Tile::init(smem_base, p.follows_prepare);
    auto ring = Tile::ring();

    const int num_k_blocks = ceil_div(p.k_len, Tile::kPositions), num_q_tiles = ceil_div(p.q_len, kTileRows);
    const int num_row_blocks = ceil_div(p.rows_per_group, Tile::kRows);

    if (warp >= Tile::kConsumerWarps) {
        release_registers<Tile::kProducerRegisters>();
        if (warp != Tile::kConsumerWarps || lane != 0) return;
        typename Tile::OwnRing keys = Tile::own_ring(0);  // those of all warpgroups move together
        for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
            const WorkItem item = decode_work_item(index, num_k_blocks, num_row_blocks, p);
            const int key0 = item.tile * Tile::kPositions;
            RowLocation rows[Tile::kRows];
            RowCoordinates at[Tile::kRows];
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r) {
                rows[r] = RowLocation::of(p, item.group, item.row_block * Tile::kRows + r);
                at[r] = RowCoordinates::of(p, rows[r]);
            }
#pragma unroll
            for (int w = 0; w < Tile::kWarpgroups; ++w) {
                const RowCoordinates& own = at[w / Tile::kKeyTiles];
                const int key = key0 + w % Tile::kKeyTiles * kTileRows;
                keys.barriers = Tile::own_ring(w).barriers;
                keys.wait_empty();
                const RowLocation& row = rows[w / Tile::kKeyTiles];
                ItemRecord record{};
                record.first = key, record.head = item.head, record.n = own.n, record.b = own.b;
                if (p.dmask_bias != nullptr)
                    record.vector_out = p.dmask_bias + row.head_row(p, item.head) * p.k_len + key;
                record.valid = row.valid ? p.k_len - key : 0;
                store_record(Tile::record(w, keys.stage), record);
                keys.announce(Tile::kOwnBytes);
                const uint32_t tile = Tile::own_tiles(w, keys.stage);
                tma_load(tile, &p.k_map, keys.full(), 0, key, item.head, own.n, own.b);
                tma_load(tile + Tile::kTileBytes, &p.v_map, keys.full(), 0, key, item.head, own.n, own.b);
                bulk_load(tile + Tile::kOwnAuxOffset, p.key_aux + p.key_row(row.b, row.n) * p.k_len_padded + key,
                          kAuxTileBytes, keys.full());
            }
            keys.advance();
            const int pair_head = p.pair_heads == 1 ? 0 : item.head, pair_group = p.pair_batch == 1 ? 0 : item.group;
            for (int q_tile = 0; q_tile < num_q_tiles; ++q_tile) {
                const uint32_t stage = Tile::stage(ring.stage), barrier = ring.full();
                const int q = q_tile * kTileRows;
                ring.wait_empty();
                ring.announce(Tile::kFilledBytes);
                if (kPair) {
#pragma unroll
                    for (int i = 0; i < Tile::kKeyTiles; ++i)
                        tma_load(stage + i * kBiasTileBytes, &p.pair_map, barrier, key0 + i * kTileRows, q, pair_head,
                                 pair_group);
                    bulk_load(stage + Tile::kRefsOffset,
                              pair_row(p, Tile::kRefsByMatrix ? p.pair_ref_columns : p.pair_ref, item) + q,
                              Tile::kRefsBytes, barrier);
                }
#pragma unroll
                for (int r = 0; r < Tile::kRows; ++r) {
                    const int64_t stat = rows[r].head_row(p, item.head) * p.q_len_padded + q;
                    tma_load(Tile::query_tile(stage, r), &p.q_map, barrier, 0, q, item.head, at[r].n, at[r].b);
                    tma_load(Tile::d_o_tile(stage, r), &p.d_o_map, barrier, 0, q, item.head, at[r].n, at[r].b);
                    bulk_load(Tile::aux_tile(stage, r), p.query_aux + stat, kAuxTileBytes, barrier);
                }
                ring.advance();
            }
        }
        // So that this kernel's end is the end of those before it, too.
        wait_for_previous_kernels();
    } else {
        take_registers<Tile::kConsumerRegisters>();
        const int warpgroup = warp / 4, warp_row = warp % 4 * 16;
        const int own_row = warpgroup / Tile::kKeyTiles, own_tile = warpgroup % Tile::kKeyTiles;
        const int quad = lane >> 2, pair = lane & 3;
        const float scale_log2 = p.softmax_scale * kBiasLog2E<T>;
        // The key side of the auxiliary product of dP: two ones where the query side has -delta.
        const uint32_t ones = pair == 3 ? 0x3f803f80u : 0u;
        const uint32_t delta_aux[4] = {ones, ones, 0u, 0u};
        const MatrixOperand query_tiles = Rows::over_dim(Tile::query_tile(kSmemBase, own_row));
        const MatrixOperand d_o_tiles = Rows::over_dim(Tile::d_o_tile(kSmemBase, own_row));
        const MatrixOperand summed_query_tiles = Rows::over_positions(Tile::query_tile(kSmemBase, own_row));
        const MatrixOperand summed_d_o_tiles = Rows::over_positions(Tile::d_o_tile(kSmemBase, own_row));
        const MatrixOperand aux_tiles = aux_operand(Tile::aux_tile(kSmemBase, own_row));
        const uint32_t bias_tiles =
            kept(kSmemBase + own_tile * kBiasTileBytes + transposed_bias_fragment(warp_row, lane));
        const uint32_t refs =
            kept(kSmemBase + Tile::kRefsOffset + (Tile::kRefsByMatrix ? (lane >> 3) * 16 : pair * 8));
        typename Tile::OwnRing keys = Tile::own_ring(warpgroup);
        uint32_t stored = 0;  // barrier of the operands in whose place the copy engine found the last results

        for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
            float dk[kHeadDim / 8][4], dv[kHeadDim / 8][4];
            float dmask[2] = {0.f, 0.f};  // of keys quad, quad + 8
            zero_bias(dk);
            zero_bias(dv);
            keys.wait_full();
            tma_store_wait_read();
            mbarrier_arrive_if(stored, stored != 0);
            const uint32_t own_tiles = Tile::own_tiles(warpgroup, keys.stage);
            const uint32_t aux = own_tiles + Tile::kOwnAuxOffset + (warp_row + quad) * 16 + pair * 4;
            const AuxOperand key_aux = AuxOperand::of_s(lds_u32(aux), lds_u32(aux + 128), pair);
            // This warp's keys and values as first operands.
            uint32_t own_keys[kHeadDim / 16][4], own_values[kHeadDim / 16][4];
            const uint32_t fragment = Rows::fragment(own_tiles, warp_row, lane);
#pragma unroll
            for (int i = 0; i < kHeadDim / 16; ++i) {
                ldmatrix_x4(own_keys[i], fragment ^ (i * 32));
                ldmatrix_x4(own_values[i], (fragment + Tile::kTileBytes) ^ (i * 32));
            }
            // 32 queries at a time: S of the next ones beside the exponentials of these, dP as soon as its registers
            // are free.
            float s[2][4][4], dp[4][4];
            auto start_product = [&](float (&d)[4][4], const uint32_t (&own)[kHeadDim / 16][4],
                                     const uint32_t (&aux)[4], MatrixOperand tiles, int part, int stage) {
                const uint32_t offset = stage * Tile::kStageBytes;
                const MatrixOperand b = tiles.plus(offset + part * (Tile::kTileBytes / 2));
                wgmma_fence();
                wgmma_rs<T, false, false>(d, own[0], b);
#pragma unroll
                for (int i = 1; i < kHeadDim / 16; ++i) wgmma_rs<T, false>(d, own[i], b.plus(i * Rows::kDimStep));
                wgmma_rs<bf16, false>(d, aux, aux_tiles.plus(offset + part * (kAuxTileBytes / 2)));
                wgmma_commit();
            };
            auto start_s = [&](int part, int stage) {
                start_product(s[part], own_keys, key_aux.words, query_tiles, part, stage);
            };
            auto start_dp = [&](int part, int stage) {
                start_product(dp, own_values, delta_aux, d_o_tiles, part, stage);
            };
            uint32_t finished_stage = 0;  // its queries are read until the next wait
            ring.wait_full();
            start_s(0, ring.stage);
            start_dp(0, ring.stage);
            wgmma_wait<0>();
            wgmma_complete(s[0]);
            wgmma_complete(dp);
            for (int q_tile = 0; q_tile < num_q_tiles; ++q_tile) {
                const uint32_t offset = ring.stage * Tile::kStageBytes;
                auto next = ring;
                next.advance();
                const bool last = q_tile + 1 == num_q_tiles;
                const uint32_t next_is_there = last ? 1 : next.test_full();
                // The last step computes products again that nobody reads: one under a condition would serialise all.
                const int next_stage = last ? ring.stage : next.stage;
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    float (&x)[4][4] = s[part];
                    if (part == 1) next.wait_full_unless(next_is_there);
                    start_s(part ^ 1, part == 0 ? ring.stage : next_stage);
                    // Of every eight queries the references of this lane's two.
                    float2 ref[4] = {};
                    if constexpr (kPair && Tile::kRefsByMatrix) {
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            uint32_t words[4];
                            ldmatrix_x4(words, refs + offset + (part * 2 + i) * 64);
#pragma unroll
                            for (int j = 0; j < 2; ++j)
                                ref[2 * i + j] =
                                    make_float2(bits_to_float(words[2 * j]), bits_to_float(words[2 * j + 1]));
                        }
                    } else if constexpr (kPair) {
#pragma unroll
                        for (int j = 0; j < 4; ++j) ref[j] = lds_f32x2(refs + offset + (part * 4 + j) * 32);
                    }
                    uint32_t packed[2][4];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        // Transposed: the tile's rows are queries, the product's are keys.
                        uint32_t bias[4] = {0, 0, 0, 0};
                        if (kPair) ldmatrix_x4_trans(bias, bias_tiles + offset + (part * 2 + i) * 16 * 128);
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            const float2 low = unpack2<T>(bias[2 * j]), high = unpack2<T>(bias[2 * j + 1]);
                            const float b[4] = {low.x, low.y, high.x, high.y};
                            const float2 own = ref[2 * i + j];
                            float (&y)[4] = x[2 * i + j];
#pragma unroll
                            for (int e = 0; e < 4; ++e)
                                y[e] = exp2_approx(
                                    kPair ? fmaf(y[e], scale_log2, fmaf(b[e], kBiasLog2E<T>, e % 2 ? -own.y : -own.x))
                                          : y[e] * scale_log2);
                        }
                        pack_operand<T>(packed[i], x[2 * i], x[2 * i + 1]);
                    }
                    wgmma_wait<1>();
                    wgmma_complete(dp);
                    wgmma_complete(dk);
                    wgmma_complete(dv);
                    if (part == 0) {
                        // One lane signals for its warp. By the letter of the memory model the others' ordinary reads
                        // need this; it becomes no instruction.
                        if constexpr (!Tile::kRefsByMatrix) warp_sync();
                        mbarrier_arrive_if(finished_stage, q_tile > 0 && lane == 0);
                    }
                    uint32_t packed_ds[2][4];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
#pragma unroll
                            for (int e = 0; e < 4; ++e) x[2 * i + j][e] *= dp[2 * i + j][e];
                        }
                        pack_operand<T>(packed_ds[i], x[2 * i], x[2 * i + 1]);
                    }
                    start_dp(part ^ 1, part == 0 ? ring.stage : next_stage);
                    wgmma_fence();
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const uint32_t step = offset + (part * 2 + i) * Rows::kPositionStep;
                        wgmma_rs<T, true>(dv, packed[i], summed_d_o_tiles.plus(step));
                        wgmma_rs<T, true>(dk, packed_ds[i], summed_query_tiles.plus(step));
                    }
                    wgmma_commit();
                    if (p.dmask_bias != nullptr) add_key_sums(dmask, x);
                    if (part == 0) {
                        wgmma_wait<2>();
                    } else {
                        // Not in flight from one turn of the loop to the next, or the compiler serialises all.
                        wgmma_wait<1>();
                        wgmma_complete(dp);
                    }
                    wgmma_complete(s[part ^ 1]);
                }
                finished_stage = ring.empty();
                ring = next;
            }
            const ItemRecord record = load_record<ItemRecord>(Tile::record(warpgroup, keys.stage));
            wgmma_wait<0>();
            wgmma_complete(dk);
            wgmma_complete(dv);
            if constexpr (!Tile::kRefsByMatrix) warp_sync();
            mbarrier_arrive_if(finished_stage, lane == 0);
            // This warp's part of the tiles of K and V, which only it has read, takes the results.
            stage_rows<T, kHeadDim>(fragment, dk, p.softmax_scale, p.softmax_scale);
            stage_rows<T, kHeadDim>(fragment + Tile::kTileBytes, dv, 1.f, 1.f);
            async_proxy_fence();
            warp_sync();
            if (lane == 0 && p.dk != nullptr) {
                const uint32_t rows = own_tiles + warp_row * Rows::kRowBytes;
                const int key = record.first + warp_row;
                tma_store(&p.dk_map, rows, 0, key, record.head, record.n, record.b);
                tma_store(&p.dv_map, rows + Tile::kTileBytes, 0, key, record.head, record.n, record.b);
                tma_store_commit();
            }
            if (p.dmask_bias != nullptr) store_key_sums(record, dmask, warp_row, lane);
            stored = keys.empty();
            keys.advance();
        }
        tma_store_wait_read();
    }
}

}  // namespace ds4sci

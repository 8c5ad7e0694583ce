// SPDX-License-Identifier: Apache-2.0
// dV = P^T dO, dK = scale * dS^T Q and d(mask_bias) per head = sum of dS over queries, on Hopper. A warpgroup owns 64
// keys of one row and runs over queries in order. The products are transposed, S^T = K Q^T and dP^T = V dO^T, so that
// P^T and dS^T come out as first operands of the next ones.
#pragma once
#include "bias.h"
#include "sm90/tile_config.h"

namespace ds4sci {

template <typename T, int kHeadDim, bool kPair>
__global__ void __launch_bounds__(Sm90BwdDkvTile<kHeadDim, kPair>::kThreads, 1)
    evoformer_sm90_bwd_dkv_kernel(const __grid_constant__ Sm90Params p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Tile = Sm90BwdDkvTile<kHeadDim, kPair>;
    using Rows = RowTile<kHeadDim>;
    const int warp = warp_uniform(static_cast<int>(threadIdx.x / 32)), lane = threadIdx.x % 32;
    Tile::init(smem_base, p.follows_prepare);
    auto ring = Tile::ring();

    const int num_k_blocks = ceil_div(p.k_len, Tile::kPositions), num_q_tiles = ceil_div(p.q_len, kTileRows);
    const int num_row_blocks = ceil_div(p.rows_per_group, Tile::kRows);
    const int num_items = num_k_blocks * num_row_blocks * p.heads * p.num_groups;

    if (warp >= Tile::kConsumerWarps) {
        release_registers<Tile::kProducerRegisters>();
        if (warp != Tile::kConsumerWarps || lane != 0) return;
        typename Tile::OwnRing keys = Tile::own_ring(0);  // those of all warpgroups move together
        for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
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
                record.stats = p.key_row(row.b, row.n) * p.k_len_padded + key;
                record.valid = row.valid ? p.k_len - key : 0;
                store_record(Tile::record(w, keys.stage), record);
                keys.announce(Tile::kOwnBytes);
                const uint32_t tile = Tile::own_tiles(w, keys.stage);
                tma_load(tile, &p.k_map, keys.full(), 0, key, item.head, own.n, own.b);
                tma_load(tile + Tile::kTileBytes, &p.v_map, keys.full(), 0, key, item.head, own.n, own.b);
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
                    bulk_load(stage + Tile::kRefsOffset, pair_row(p, p.pair_ref, item) + q, Tile::kVectorBytes,
                              barrier);
                }
#pragma unroll
                for (int r = 0; r < Tile::kRows; ++r) {
                    const int64_t stat = rows[r].head_row(p, item.head) * p.q_len_padded + q;
                    tma_load(Tile::query_tile(stage, r), &p.q_map, barrier, 0, q, item.head, at[r].n, at[r].b);
                    tma_load(Tile::d_o_tile(stage, r), &p.d_o_map, barrier, 0, q, item.head, at[r].n, at[r].b);
                    bulk_load(Tile::aux_tile(stage, r), p.query_aux + stat, kAuxTileBytes, barrier);
                    bulk_load(Tile::delta_of(stage, r), p.delta + stat, Tile::kVectorBytes, barrier);
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
        // Of the four blocks of bias terms, how many are worked out while the products run: two warpgroups gain by
        // it, as far as the registers go, three lose.
        constexpr int kEarlyTerms = kHeadDim == 64 ? 2 : 0;
        const MatrixOperand key_tiles = Rows::over_dim(Tile::own_tiles(warpgroup, 0));
        const MatrixOperand query_tiles = Rows::over_dim(Tile::query_tile(kSmemBase, own_row));
        const MatrixOperand d_o_tiles = Rows::over_dim(Tile::d_o_tile(kSmemBase, own_row));
        const MatrixOperand summed_query_tiles = Rows::over_positions(Tile::query_tile(kSmemBase, own_row));
        const MatrixOperand summed_d_o_tiles = Rows::over_positions(Tile::d_o_tile(kSmemBase, own_row));
        const MatrixOperand aux_tiles = aux_operand(Tile::aux_tile(kSmemBase, own_row));
        // Transposed fragments of the bias tile, whose rows are queries: keys become rows.
        const uint32_t bias_tiles = kept(kSmemBase + own_tile * kBiasTileBytes + ((lane >> 4) * 8 + (lane & 7)) * 128 +
                                         ((warp_row * 2 + ((lane >> 3) & 1) * 16) ^ ((lane & 7) << 4)));
        const uint32_t vectors = kept(kSmemBase + pair * 8);
        typename Tile::OwnRing keys = Tile::own_ring(warpgroup);
        uint32_t stored = 0;  // barrier of the operands in whose place the copy engine found the last results

        for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
            float dk[kHeadDim / 8][4], dv[kHeadDim / 8][4];
            float dmask[2] = {0.f, 0.f};  // of keys quad, quad + 8
            zero_bias(dk);
            zero_bias(dv);
            keys.wait_full();
            tma_store_wait_read();
            mbarrier_arrive_if(stored, stored != 0);
            // Read twice, here and below: kept through the loop, it would not fit the registers.
            const int64_t stats = load_record<ItemRecord>(Tile::record(warpgroup, keys.stage)).stats;
            const uint32_t* aux = reinterpret_cast<const uint32_t*>(p.key_aux + stats + warp_row + quad) + pair;
            const AuxOperand key_aux = AuxOperand::of_s(aux[0], aux[32], pair);
            const MatrixOperand key_tile = key_tiles.plus(keys.stage * Tile::kBufferBytes);
            const MatrixOperand value_tile = key_tile.plus(Tile::kTileBytes);
            uint32_t finished_stage = 0;  // its queries are read until the next wait
            for (int q_tile = 0; q_tile < num_q_tiles; ++q_tile) {
                const uint32_t offset = ring.stage * Tile::kStageBytes;
                float s[8][4], dp[8][4];
                ring.wait_full();
                wgmma_fence();
                Rows::template product_abt<T>(s, key_tile, query_tiles.plus(offset));
                wgmma_rs<bf16, false>(s, key_aux.words, aux_tiles.plus(offset));
                wgmma_commit();
                Rows::template product_abt<T>(dp, value_tile, d_o_tiles.plus(offset));
                wgmma_commit();
                // What the biases add to the logits of 16 queries.
                auto bias_terms = [&](float (&terms)[2][4], int i) {
                    uint32_t bias[4];
                    ldmatrix_x4_trans(bias, bias_tiles + offset + i * 16 * 128);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const float2 low = unpack2<T>(bias[2 * j]), high = unpack2<T>(bias[2 * j + 1]);
                        const float b[4] = {low.x, low.y, high.x, high.y};
                        const float2 ref = lds_f32x2(vectors + offset + Tile::kRefsOffset + (2 * i + j) * 32);
#pragma unroll
                        for (int e = 0; e < 4; ++e) terms[j][e] = fmaf(b[e], kBiasLog2E<T>, e % 2 ? -ref.y : -ref.x);
                    }
                };
                float terms[4][2][4];
                if (kPair) {
#pragma unroll
                    for (int i = 0; i < kEarlyTerms; ++i) bias_terms(terms[i], i);
                }
                wgmma_wait<1>();
                wgmma_complete(s);
                mbarrier_arrive_if(finished_stage, q_tile > 0 && lane == 0);
                uint32_t packed[4][4];
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
                    pack_operand<T>(packed[i], s[2 * i], s[2 * i + 1]);
                }
                wgmma_wait<0>();
                wgmma_complete(dp);
                wgmma_complete(dk);
                wgmma_complete(dv);
                uint32_t packed_ds[4][4];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    // A second auxiliary operand, which would subtract it from dP, would not fit the registers.
                    const float2 delta = lds_f32x2(vectors + offset + Tile::delta_of(0, own_row) + j * 32);
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[j][e] *= dp[j][e] - (e % 2 ? delta.y : delta.x);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) pack_operand<T>(packed_ds[i], s[2 * i], s[2 * i + 1]);
                wgmma_fence();
                Rows::template product_pb<T>(dv, packed, summed_d_o_tiles.plus(offset));
                Rows::template product_pb<T>(dk, packed_ds, summed_query_tiles.plus(offset));
                wgmma_commit();
                // A condition before the product would serialise it.
                if (p.dmask_bias != nullptr) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) {
                        dmask[0] += s[j][0] + s[j][1];
                        dmask[1] += s[j][2] + s[j][3];
                    }
                }
                finished_stage = ring.empty();
                ring.advance();
            }
            const ItemRecord record = load_record<ItemRecord>(Tile::record(warpgroup, keys.stage));
            wgmma_wait<0>();
            wgmma_complete(dk);
            wgmma_complete(dv);
            mbarrier_arrive_if(finished_stage, lane == 0);
            // K and V are read by all warps of the warpgroup: their tiles take the results.
            named_barrier_sync(1 + warpgroup, 128);
            const uint32_t staged = Tile::own_tiles(warpgroup, keys.stage);
            const uint32_t fragment = Rows::fragment(staged, warp_row, lane);
            stage_rows<T, kHeadDim>(fragment, dk, p.softmax_scale, p.softmax_scale);
            stage_rows<T, kHeadDim>(fragment + Tile::kTileBytes, dv, 1.f, 1.f);
            async_proxy_fence();
            warp_sync();
            if (lane == 0 && p.dk != nullptr) {
                const uint32_t rows = staged + warp_row * Rows::kRowBytes;
                const int key = record.first + warp_row;
                tma_store(&p.dk_map, rows, 0, key, record.head, record.n, record.b);
                tma_store(&p.dv_map, rows + Tile::kTileBytes, 0, key, record.head, record.n, record.b);
                tma_store_commit();
            }
            if (p.dmask_bias != nullptr) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    dmask[i] += shfl_xor(dmask[i], 1);
                    dmask[i] += shfl_xor(dmask[i], 2);
                    const int key = warp_row + quad + 8 * i;
                    if (pair == 0 && key < record.valid) record.vector_out[key] = dmask[i];
                }
            }
            stored = keys.empty();
            keys.advance();
        }
        tma_store_wait_read();
    }
}

}  // namespace ds4sci

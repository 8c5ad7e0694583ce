// SPDX-License-Identifier: Apache-2.0
// dQ, dK, dV and d(mask_bias) at once on Hopper: S, P and dP of all of them are the same. A block owns all keys and
// queries of one row and head, so that every sum has one owner. It goes through the keys in passes; in a pass each
// warpgroup has 64 keys and runs over the queries, 32 at a time. The products are transposed, S^T = K Q^T and
// dP^T = V dO^T, so that P^T and dS^T come out as first operands of dV and dK. dS^T also goes through shared memory to
// one more warpgroup, which multiplies it by K: that is dQ of the pass's keys, added to what the passes before left in
// a scratch of the block. This warpgroup copies, too.
#pragma once
#include "bias.h"
#include "sm90/key_rows.cuh"

namespace ds4sci {

constexpr uint32_t kMinusInfinityBf16 = 0xff80u;

template <typename T, int kHeadDim, int kConsumers, bool kPair>
__global__ void __launch_bounds__(Sm90BwdDqkvTile<kHeadDim, kConsumers, kPair>::kThreads, 1)
    evoformer_sm90_bwd_dqkv_kernel(const __grid_constant__ Sm90Params p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Tile = Sm90BwdDqkvTile<kHeadDim, kConsumers, kPair>;
    using Rows = RowTile<kHeadDim>;
    using DsRows = RowTile<64>;  // rows of a tile of dS^T are keys, 64 queries long
    const int warp = warp_uniform(static_cast<int>(threadIdx.x / 32)), lane = threadIdx.x % 32;
    Tile::init(smem_base, p.follows_prepare);
    auto ring = Tile::ring();
    auto keys = Tile::key_ring();
    const int num_passes = ceil_div(p.k_len, Tile::kKeys), num_q_tiles = ceil_div(p.q_len, kTileRows);
    int slot = 0;
    uint32_t slot_phase = 0;
    auto advance_slot = [&] {
        if (++slot == Tile::kSlots) {
            slot = 0;
            slot_phase ^= 1;
        }
    };

    if (warp >= Tile::kConsumerWarps) {
        release_registers<Tile::kReducerRegisters>();
        const int own_warp = warp - Tile::kConsumerWarps, thread = threadIdx.x - Tile::kConsumerWarps * 32;
        // Copies. The stages and the keys are shared out to the warps, whose first lanes bring them.
        struct Cursor {
            int index, pass, half;
            RowCoordinates at;
            int head, pair_head, pair_group;
            const uint4* aux;
            const float* refs;
        } next{static_cast<int>(blockIdx.x), 0, 0, {}, 0, 0, 0, nullptr, nullptr};
        auto find_item = [&] {
            const WorkItem item = decode_work_item(next.index, 1, p.rows_per_group, p);
            const RowLocation row = RowLocation::of(p, item.group, item.row_block);
            next.at = RowCoordinates::of(p, row);
            next.head = item.head;
            next.pair_head = p.pair_heads == 1 ? 0 : item.head;
            next.pair_group = p.pair_batch == 1 ? 0 : item.group;
            next.aux = p.query_aux + row.head_row(p, item.head) * p.q_len_padded;
            if (kPair) next.refs = pair_row(p, Tile::kRefsByMatrix ? p.pair_ref_columns : p.pair_ref, item);
        };
        auto load_queries = [&](int stage_index) {
            if (next.index >= p.num_items) return;
            const uint32_t stage = Tile::stage(stage_index), barrier = ring.barriers + stage_index * 8;
            const int q = next.half * Tile::kHalfRows, key0 = next.pass * Tile::kKeys;
            if (own_warp == 0) {
                mbarrier_arrive_expect(barrier, Tile::kHalfBytes);
                tma_load(stage + Tile::kQueryOffset, &p.q_map, barrier, 0, q, next.head, next.at.n, next.at.b);
            } else if (own_warp == 1) {
                mbarrier_arrive_expect(barrier, Tile::kHalfBytes + Tile::kHalfAuxBytes);
                tma_load(stage + Tile::kDOOffset, &p.d_o_map, barrier, 0, q, next.head, next.at.n, next.at.b);
                bulk_load(stage + Tile::kAuxOffset, next.aux + q, Tile::kHalfAuxBytes, barrier);
            } else if (kPair) {
                // The third warp brings two tiles of the bias, the fourth the others and the references.
                const int begin = own_warp == 2 ? 0 : 2, end = own_warp == 2 ? 2 : kConsumers;
                mbarrier_arrive_expect(
                    barrier, (end - begin) * Tile::kBiasHalfBytes + (own_warp == 3 ? Tile::kHalfRefsBytes : 0));
                for (int i = begin; i < end; ++i)
                    tma_load(stage + i * Tile::kBiasHalfBytes, &p.pair_map, barrier, key0 + i * kTileRows, q,
                             next.pair_head, next.pair_group);
                if (own_warp == 3) bulk_load(stage + Tile::kRefsOffset, next.refs + q, Tile::kHalfRefsBytes, barrier);
            }
            if (++next.half == 2 * num_q_tiles) {
                next.half = 0;
                if (++next.pass == num_passes) {
                    next.pass = 0;
                    next.index += gridDim.x;
                    if (next.index < p.num_items) find_item();
                }
            }
        };
        // K, V and their side of the auxiliary product, of the warpgroup of this warp's number.
        auto load_keys = [&](int index, int pass, int sequence) {
            const int buffer = sequence % Tile::kKeyBuffers;
            if (index >= p.num_items || own_warp >= kConsumers) return;
            const WorkItem item = decode_work_item(index, 1, p.rows_per_group, p);
            const RowLocation row = RowLocation::of(p, item.group, item.row_block);
            const RowCoordinates at = RowCoordinates::of(p, row);
            const int key = pass * Tile::kKeys + own_warp * kTileRows;
            ItemRecord record{};
            record.first = key, record.head = item.head, record.n = at.n, record.b = at.b;
            record.valid = p.k_len - key;
            if (p.dmask_bias != nullptr) record.vector_out = p.dmask_bias + row.head_row(p, item.head) * p.k_len + key;
            store_record(Tile::record(own_warp, sequence), record);
            const uint32_t tile = Tile::own_tiles(own_warp, buffer), barrier = keys.barriers + buffer * 8;
            // Tiles past the last key arrive as zeros.
            const bool exists = key < p.k_len;
            mbarrier_arrive_expect(barrier, 2 * Tile::kTileBytes + (exists ? kAuxTileBytes : 0));
            tma_load(tile, &p.k_map, barrier, 0, key, item.head, at.n, at.b);
            tma_load(tile + Tile::kTileBytes, &p.v_map, barrier, 0, key, item.head, at.n, at.b);
            if (exists)
                bulk_load(tile + Tile::kOwnAuxOffset, p.key_aux + p.key_row(row.b, row.n) * p.k_len_padded + key,
                          kAuxTileBytes, barrier);
        };
        if (lane == 0 && next.index < p.num_items) {
            find_item();
            load_keys(blockIdx.x, 0, 0);
            for (int i = 0; i < Tile::kStages; ++i) load_queries(i);
            load_keys(blockIdx.x + 1 / num_passes * gridDim.x, 1 % num_passes, 1);
        }
        const uint32_t staging = Rows::fragment(Tile::kStagingOffset, own_warp * kStoredRows, lane);
        float* scratch = p.dq_scratch + static_cast<int64_t>(blockIdx.x) * p.q_len_padded * kHeadDim + thread * 4;
        int previous_stage = -1;  // which all have read when the next dS is there
        for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
            for (int pass = 0; pass < num_passes; ++pass) {
                keys.wait_full();
                const bool last = pass + 1 == num_passes;
                for (int q_tile = 0; q_tile < num_q_tiles; ++q_tile) {
                    float dq[kHeadDim / 8][4];
                    float* const sums = scratch + q_tile * kTileRows * kHeadDim;
                    if (pass == 0) {
                        zero_bias(dq);
                    } else {
#pragma unroll
                        for (int i = 0; i < kHeadDim / 8; ++i) load_cached(dq[i], sums + i * 512);
                    }
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        mbarrier_wait(Tile::ds_full(slot, half), slot_phase);
                        if (lane == 0 && previous_stage >= 0) load_queries(previous_stage);
                        if (++previous_stage == Tile::kStages) previous_stage = 0;
                    }
                    const uint32_t ds = Tile::ds_slot(slot), own = Tile::own_tiles(0, keys.stage);
                    wgmma_fence();
#pragma unroll
                    for (int w = 0; w < kConsumers; ++w) {
                        const MatrixOperand scores = DsRows::over_positions(ds + w * DsRows::kBytes);
                        const MatrixOperand key_tile = Rows::over_positions(own + w * Tile::kOwnBytes);
#pragma unroll
                        for (int step = 0; step < 4; ++step)
                            wgmma_ss<T, true, true, true>(dq, scores.plus(step * DsRows::kPositionStep),
                                                          key_tile.plus(step * Rows::kPositionStep));
                    }
                    wgmma_commit();
                    wgmma_wait<0>();
                    wgmma_complete(dq);
                    mbarrier_arrive_if(Tile::ds_empty(slot), lane == 0);
                    advance_slot();
                    if (!last) {
#pragma unroll
                        for (int i = 0; i < kHeadDim / 8; ++i) store_cached(sums + i * 512, dq[i]);
                    } else {
                        tma_store_wait_read();
                        warp_sync();
                        stage_rows<T, kHeadDim>(staging, dq, p.softmax_scale, p.softmax_scale);
                        async_proxy_fence();
                        warp_sync();
                        if (lane == 0) {
                            const ItemRecord record = load_record<ItemRecord>(Tile::record(0, Tile::sequence(keys)));
                            tma_store(&p.dq_map, Tile::kStagingOffset + own_warp * kStoredRows * Rows::kRowBytes, 0,
                                      q_tile * kTileRows + own_warp * kStoredRows, record.head, record.n, record.b);
                            tma_store_commit();
                        }
                    }
                }
                // All have read these keys: the products above were the last. The next pass's are in the other buffer.
                named_barrier_sync(1, 128);
                if (lane == 0) {
                    const int ahead = pass + 2;
                    load_keys(index + ahead / num_passes * gridDim.x, ahead % num_passes, Tile::sequence(keys) ^ 2);
                }
                keys.advance();
            }
        }
        tma_store_wait_read();
        // So that this kernel's end is the end of those before it, too.
        wait_for_previous_kernels();
    } else {
        take_registers<Tile::kConsumerRegisters>();
        const int warpgroup = warp / 4, warp_row = warp % 4 * 16;
        const int quad = lane >> 2, pair = lane & 3;
        const float scale_log2 = p.softmax_scale * kBiasLog2E<T>;
        // The key side of the auxiliary product of dP: two ones where the query side has -delta.
        const uint32_t ones = pair == 3 ? 0x3f803f80u : 0u;
        const uint32_t delta_aux[4] = {ones, ones, 0u, 0u};
        const MatrixOperand query_tiles = Rows::over_dim(kSmemBase + Tile::kQueryOffset);
        const MatrixOperand d_o_tiles = Rows::over_dim(kSmemBase + Tile::kDOOffset);
        const MatrixOperand summed_query_tiles = Rows::over_positions(kSmemBase + Tile::kQueryOffset);
        const MatrixOperand summed_d_o_tiles = Rows::over_positions(kSmemBase + Tile::kDOOffset);
        const MatrixOperand aux_tiles = aux_operand(kSmemBase + Tile::kAuxOffset);
        const uint32_t bias_tile =
            kept(kSmemBase + warpgroup * Tile::kBiasHalfBytes + transposed_bias_fragment(warp_row, lane));
        const uint32_t refs =
            kept(kSmemBase + Tile::kRefsOffset + (Tile::kRefsByMatrix ? (lane >> 3) * 16 : pair * 8));
        // This warp's 16 rows of dS^T.
        const uint32_t ds_rows = kept(DsRows::fragment(Tile::ds_slot(0) + warpgroup * DsRows::kBytes, warp_row, lane));

        for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
            for (int pass = 0; pass < num_passes; ++pass) {
                float dk[kHeadDim / 8][4], dv[kHeadDim / 8][4];
                float dmask[2] = {0.f, 0.f};  // of keys quad, quad + 8
                zero_bias(dk);
                zero_bias(dv);
                keys.wait_full();
                const uint32_t own = Tile::own_tiles(warpgroup, keys.stage);
                const uint32_t aux = own + Tile::kOwnAuxOffset + (warp_row + quad) * 16 + pair * 4;
                const int valid = static_cast<int>(lds_u32(Tile::record_valid(warpgroup, Tile::sequence(keys))));
                // Keys past the end: their bias reads as zero, which may be 1e38 above the row's, and in a tile of
                // such keys alone no key side of the auxiliary product arrives. -inf as their mask, beside zeros,
                // leaves P = 0.
                const uint32_t dropped = pair == 0 ? kMinusInfinityBf16 : 0u;
                const AuxOperand key_aux =
                    AuxOperand::of_s(warp_row + quad < valid ? lds_u32(aux) : dropped,
                                     warp_row + quad + 8 < valid ? lds_u32(aux + 128) : dropped, pair);
                uint32_t own_keys[Tile::kInRegisters ? kHeadDim / 16 : 1][4],
                    own_values[Tile::kInRegisters ? kHeadDim / 16 : 1][4];
                if constexpr (Tile::kInRegisters) {
                    const uint32_t fragment = Rows::fragment(own, warp_row, lane);
#pragma unroll
                    for (int i = 0; i < kHeadDim / 16; ++i) {
                        ldmatrix_x4(own_keys[i], fragment ^ (i * 32));
                        ldmatrix_x4(own_values[i], (fragment + Tile::kTileBytes) ^ (i * 32));
                    }
                }
                const MatrixOperand key_tile = Rows::over_dim(own);
                auto start_product = [&](float (&d)[4][4],
                                         const uint32_t (&in_registers)[Tile::kInRegisters ? kHeadDim / 16 : 1][4],
                                         MatrixOperand a, const uint32_t (&aux)[4], MatrixOperand b, uint32_t offset) {
                    b = b.plus(offset);
                    wgmma_fence();
                    if constexpr (Tile::kInRegisters) {
                        wgmma_rs<T, false, false>(d, in_registers[0], b);
#pragma unroll
                        for (int i = 1; i < kHeadDim / 16; ++i)
                            wgmma_rs<T, false>(d, in_registers[i], b.plus(i * Rows::kDimStep));
                    } else {
                        Rows::template product_abt<T>(d, a, b);
                    }
                    wgmma_rs<bf16, false>(d, aux, aux_tiles.plus(offset));
                    wgmma_commit();
                };
                for (int q_tile = 0; q_tile < num_q_tiles; ++q_tile) {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint32_t offset = ring.stage * Tile::kStageBytes;
                        float s[4][4], dp[4][4];
                        ring.wait_full();
                        start_product(s, own_keys, key_tile, key_aux.words, query_tiles, offset);
                        if constexpr (!Tile::kLateDp) {
                            // The operands of dV and dK, in registers, make room for dP.
                            wgmma_wait<1>();
                            wgmma_complete(dk);
                            wgmma_complete(dv);
                            start_product(dp, own_values, key_tile.plus(Tile::kTileBytes), delta_aux, d_o_tiles,
                                          offset);
                        }
                        // Transposed: the tile's rows are queries, the product's are keys.
                        uint32_t bias[2][4] = {}, ref_words[2][4] = {};
                        auto load_bias = [&] {
#pragma unroll
                            for (int i = 0; i < 2; ++i) {
                                if constexpr (kPair) ldmatrix_x4_trans(bias[i], bias_tile + offset + i * 16 * 128);
                                if constexpr (kPair && Tile::kRefsByMatrix)
                                    ldmatrix_x4(ref_words[i], refs + offset + i * 64);
                            }
                        };
                        if constexpr (Tile::kEarlyBias) load_bias();
                        wgmma_wait<Tile::kLateDp ? 0 : 1>();
                        if constexpr (Tile::kLateDp) {
                            wgmma_complete(dk);
                            wgmma_complete(dv);
                        }
                        wgmma_complete(s);
                        if constexpr (!Tile::kEarlyBias) load_bias();
                        uint32_t packed[2][4], packed_ds[2][4];
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            float2 ref[2] = {};  // of every eight queries those of this lane's two
#pragma unroll
                            for (int j = 0; j < 2; ++j) {
                                if constexpr (kPair && Tile::kRefsByMatrix) {
                                    ref[j] = make_float2(bits_to_float(ref_words[i][2 * j]),
                                                         bits_to_float(ref_words[i][2 * j + 1]));
                                } else if constexpr (kPair) {
                                    ref[j] = lds_f32x2(refs + offset + (i * 2 + j) * 32);
                                }
                            }
#pragma unroll
                            for (int j = 0; j < 2; ++j) {
                                const float2 low = unpack2<T>(bias[i][2 * j]), high = unpack2<T>(bias[i][2 * j + 1]);
                                const float b[4] = {low.x, low.y, high.x, high.y};
                                float (&y)[4] = s[2 * i + j];
#pragma unroll
                                for (int e = 0; e < 4; ++e)
                                    y[e] = exp2_approx(
                                        kPair ? fmaf(y[e], scale_log2,
                                                     fmaf(b[e], kBiasLog2E<T>, e % 2 ? -ref[j].y : -ref[j].x))
                                              : y[e] * scale_log2);
                                if constexpr (Tile::kLateDp) {
                                    if (i == 1 && j == 0)
                                        start_product(dp, own_values, key_tile.plus(Tile::kTileBytes), delta_aux,
                                                      d_o_tiles, offset);
                                }
                            }
                        }
#pragma unroll
                        for (int i = 0; i < 2; ++i) pack_operand<T>(packed[i], s[2 * i], s[2 * i + 1]);
                        wgmma_wait<0>();
                        wgmma_complete(dp);
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
#pragma unroll
                            for (int j = 0; j < 2; ++j) {
#pragma unroll
                                for (int e = 0; e < 4; ++e) s[2 * i + j][e] *= dp[2 * i + j][e];
                            }
                            pack_operand<T>(packed_ds[i], s[2 * i], s[2 * i + 1]);
                        }
                        if (half == 0) mbarrier_wait(Tile::ds_empty(slot), slot_phase ^ 1);
                        const uint32_t ds = (ds_rows + slot * Tile::kSlotBytes) ^ (half * 64);
                        stmatrix_x4(ds, packed_ds[0]);
                        stmatrix_x4(ds ^ 32, packed_ds[1]);
                        async_proxy_fence();
                        warp_sync();
                        mbarrier_arrive_if(Tile::ds_full(slot, half), lane == 0);
                        wgmma_fence();
#pragma unroll
                        for (int i = 0; i < 2; ++i) {
                            const uint32_t step = offset + i * Rows::kPositionStep;
                            wgmma_rs<T, true>(dv, packed[i], summed_d_o_tiles.plus(step));
                            wgmma_rs<T, true>(dk, packed_ds[i], summed_query_tiles.plus(step));
                        }
                        wgmma_commit();
                        if (p.dmask_bias != nullptr) add_key_sums(dmask, s);
                        ring.advance();
                    }
                    advance_slot();
                }
                const ItemRecord record = load_record<ItemRecord>(Tile::record(warpgroup, Tile::sequence(keys)));
                wgmma_wait<0>();
                wgmma_complete(dk);
                wgmma_complete(dv);
                // This warp's rows of the next slot of dS take the results, when nobody reads that slot any more.
                mbarrier_wait(Tile::ds_empty(slot), slot_phase ^ 1);
                const uint32_t rows = Tile::ds_slot(slot) + warpgroup * DsRows::kBytes + warp_row * DsRows::kRowBytes;
                const int key = record.first + warp_row;
                constexpr bool kBoth = 2 * Rows::kRowBytes <= DsRows::kRowBytes;
                const uint32_t place = Rows::fragment(rows, 0, lane);
                constexpr uint32_t kSecond = kBoth ? kStoredRows * Rows::kRowBytes : 0;
                stage_rows<T, kHeadDim>(place, dk, p.softmax_scale, p.softmax_scale);
                if (kBoth) stage_rows<T, kHeadDim>(place + kSecond, dv, 1.f, 1.f);
                async_proxy_fence();
                warp_sync();
                if (lane == 0) {
                    tma_store(&p.dk_map, rows, 0, key, record.head, record.n, record.b);
                    if (kBoth) tma_store(&p.dv_map, rows + kSecond, 0, key, record.head, record.n, record.b);
                    tma_store_commit();
                    tma_store_wait_read();
                }
                warp_sync();
                if (!kBoth) {
                    stage_rows<T, kHeadDim>(place, dv, 1.f, 1.f);
                    async_proxy_fence();
                    warp_sync();
                    if (lane == 0) {
                        tma_store(&p.dv_map, rows, 0, key, record.head, record.n, record.b);
                        tma_store_commit();
                        tma_store_wait_read();
                    }
                    warp_sync();
                }
                if (p.dmask_bias != nullptr) store_key_sums(record, dmask, warp_row, lane);
                keys.advance();
            }
        }
    }
}

}  // namespace ds4sci

// SPDX-License-Identifier: Apache-2.0
// Forward with a pair bias on Hopper up to head dim 32, without a running maximum, as fwd_kernel.cuh, whose online
// softmax computes marked work items again. Each warpgroup has 64 queries of two rows, which share the bias once it
// is unpacked and its references are subtracted, a third of the work per logit. It takes 32 keys at a time: the logits
// of the second row run beside exponentials of the first, the output of the first beside those of the second, and what
// else has to be waited for is hidden by the other warps.
#pragma once
#include "sm90/fwd_kernel.cuh"

namespace ds4sci {

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Sm90FwdTwoRowTile<kHeadDim>::kThreads, 1)
    evoformer_sm90_fwd_two_row_kernel(const __grid_constant__ Sm90Params p) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Tile = Sm90FwdTwoRowTile<kHeadDim>;
    using Online = Sm90FwdTile<kHeadDim, true>;
    static_assert(Tile::kPositions == Online::kPositions, "work items differ in their rows alone");
    using Rows = RowTile<kHeadDim>;
    using Values = ValuesWithOnes<kHeadDim>;
    constexpr int kOwnRows = Tile::kOwnRows, kKeys = kTileRows / 2;
    // Whether the second row's logits start when half of the first row's exponentials are through, not ahead of them:
    // slower at head dim 16.
    constexpr bool kLateLogits = kHeadDim == 32;
    const int warp = warp_uniform(static_cast<int>(threadIdx.x / 32)), lane = threadIdx.x % 32;
    Values::template write_ones<T>(Tile::kOnesOffset, threadIdx.x, Tile::kThreads);
    async_proxy_fence();
    Tile::init(smem_base, true, 256);
    auto ring = Tile::ring();

    if (warp >= Tile::kConsumerWarps) {
        release_registers<Tile::kProducerRegisters>();
        if (warp != Tile::kConsumerWarps || lane != 0) return;
        const int num_q_blocks = ceil_div(p.q_len, Tile::kPositions);
        const int num_row_blocks = ceil_div(p.rows_per_group, Tile::kRows);
        typename Tile::OwnRing queries = Tile::own_ring(0);  // those of both teams move together
        for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
            const WorkItem item = decode_work_item(index, num_q_blocks, num_row_blocks, p);
            const int q0 = item.tile * Tile::kPositions;
            RowLocation rows[Tile::kRows];
#pragma unroll
            for (int r = 0; r < Tile::kRows; ++r) {
                const int row_in_group = item.row_block * Tile::kRows + r;
                rows[r] = RowLocation::of(p, item.group, row_in_group);
                const RowCoordinates at = RowCoordinates::of(p, rows[r]);
                queries.barriers = Tile::own_ring(r / kOwnRows).barriers;
                // Announced ahead of the records, which are read at the end of the item: it is the announcement of its
                // stages of keys that makes them visible.
                if (r % kOwnRows == 0) {
                    queries.wait_empty();
                    queries.announce(kOwnRows * 2 * Tile::kTileBytes + Tile::kRefsBytes);
                    bulk_load(Tile::refs(r / kOwnRows, queries.stage), pair_row(p, p.pair_ref, item) + q0,
                              Tile::kRefsBytes, queries.full());
                }
                ItemRecord record{};
                describe_queries<T>(record, p, rows[r], at, item.head, q0);
                record.index = encode_work_item({item.tile, row_in_group / Online::kRows, item.head, item.group},
                                                num_q_blocks, ceil_div(p.rows_per_group, Online::kRows), p);
                store_record(Tile::record(r, queries.stage), record);
                const uint32_t tile = Tile::own_tiles(r, queries.stage);
                load_query_tiles<Tile>(p, tile, queries.full(), q0, item.head, at);
            }
            queries.advance();
            stream_keys<Tile>(p, ring, rows, q0, item);
        }
    } else {
        take_registers<Tile::kConsumerRegisters>();
        const int warpgroup = warp / 4, warp_row = warp % 4 * 16, num_k_tiles = ceil_div(p.k_len, kTileRows);
        const int team = warpgroup / 2, half = warpgroup % 2, first_row = team * kOwnRows;
        const int quad = lane >> 2, pair = lane & 3;
        // With late logits the test spills four bytes if it is found again in every turn.
        const uint32_t first_lane = kLateLogits ? kept(lane == 0) : lane == 0;
        // The query side of the auxiliary product: three ones.
        const uint32_t ones = pair == 0 ? 0x3f803f80u : pair == 1 ? 0x00003f80u : 0u;
        const uint32_t query_aux[4] = {ones, ones, 0u, 0u};
        const float scale = p.softmax_scale * kBiasLog2E<T>;
        // Operands of the first row of the block in the first stage; one distance from there, worked out once for a
        // stage, leads to all others.
        const MatrixOperand key_tiles = Rows::over_dim(Tile::key_tile(kSmemBase, 0));
        const MatrixOperand aux_tiles = aux_operand(Tile::aux_tile(kSmemBase, 0));
        const MatrixOperand value_tiles = Values::of(Tile::value_tile(kSmemBase, 0), Tile::kOnesOffset).values;
        const uint32_t bias_tile = kept(kSmemBase + half * kBiasTileBytes + bias_fragment(warp_row, lane));
        typename Tile::OwnRing queries = Tile::own_ring(team);
        uint32_t stored = 0;  // barrier of the queries in whose place the copy engine found the last output

        for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
            float o[kOwnRows][Values::kOutputTiles][4];
            StaticSoftmax<T> softmax[kOwnRows];
#pragma unroll
            for (int r = 0; r < kOwnRows; ++r) {
                softmax[r].reset();
                zero_bias(o[r]);
            }
            queries.wait_full();
            tma_store_wait_read();
            mbarrier_arrive_if(stored, stored != 0);
            const uint32_t staged = Tile::own_tiles(first_row, queries.stage) + half * Tile::kTileBytes;
            const MatrixOperand query_tiles = Rows::over_dim(staged);
            const uint32_t refs = Tile::refs(team, queries.stage) + (half * kTileRows + warp_row + quad) * 4;
            const float ref[2] = {lds_f32(refs), lds_f32(refs + 32)};  // of queries quad, quad + 8
            uint32_t finished_stage = 0;                               // its values are read until the next wait
            for (int k_tile = 0; k_tile < num_k_tiles; ++k_tile) {
                const uint32_t stage = ring.stage * Tile::kStageBytes, own = stage + first_row * Tile::kRowBytes;
                ring.wait_full();
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    float s[kOwnRows][4][4];
                    auto start_logits = [&](int r) {
                        const MatrixOperand keys =
                            key_tiles.plus(own).plus(r * Tile::kRowBytes + part * Tile::kTileBytes / 2);
                        wgmma_fence();
                        Rows::template product_abt<T>(s[r], query_tiles.plus(r * 2 * Tile::kTileBytes), keys);
                        wgmma_rs<bf16, false>(
                            s[r], query_aux, aux_tiles.plus(own).plus(r * Tile::kRowBytes + part * kAuxTileBytes / 2));
                        wgmma_commit();
                    };
                    start_logits(0);
                    uint32_t words[2][4];
#pragma unroll
                    for (int i = 0; i < 2; ++i) ldmatrix_x4(words[i], (bias_tile + stage) ^ (part * 64 + i * 32));
                    float bias[4][4];
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float2 low = unpack2<T>(words[j / 2][j % 2 * 2]),
                                     high = unpack2<T>(words[j / 2][j % 2 * 2 + 1]);
                        const float b[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
                        for (int e = 0; e < 4; ++e) bias[j][e] = fmaf(b[e], kBiasLog2E<T>, -ref[e / 2]);
                    }
                    wgmma_wait<0>();
                    wgmma_complete(s[0]);
                    wgmma_complete(o[0]);
                    wgmma_complete(o[1]);
                    if (part == 0) mbarrier_arrive_if(finished_stage, k_tile > 0 && first_lane);
                    if constexpr (!kLateLogits) start_logits(1);
#pragma unroll
                    for (int r = 0; r < kOwnRows; ++r) {
                        if (r == 1) {
                            wgmma_wait<1>();  // the output of the first row may be on its way
                            wgmma_complete(s[1]);
                        }
                        uint32_t packed[2][4];
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            float (&x)[4] = s[r][j];
#pragma unroll
                            for (int e = 0; e < 4; ++e) x[e] = exp2_approx(fmaf(x[e], scale, bias[j][e]));
                            if constexpr (kLateLogits) {
                                softmax[r].add(x);
                                if (j % 2 == 1) pack_operand<T>(packed[j / 2], s[r][j - 1], x);
                                if (r == 0 && j == 1) start_logits(1);
                            }
                        }
                        if constexpr (!kLateLogits) {
#pragma unroll
                            for (int i = 0; i < 2; ++i) pack_operand<T>(packed[i], s[r][2 * i], s[r][2 * i + 1]);
                            softmax[r].add(s[r]);
                        }
                        wgmma_fence();
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            wgmma_rs<T, true>(
                                o[r], packed[i],
                                value_tiles.plus_before_fixed(own).plus_before_fixed(
                                    r * Tile::kRowBytes + (part * kKeys / 16 + i) * Rows::kPositionStep));
                        wgmma_commit();
                    }
                }
                finished_stage = ring.empty();
                ring.advance();
            }
            wgmma_wait<0>();
            wgmma_complete(o[0]);
            wgmma_complete(o[1]);
            mbarrier_arrive_if(finished_stage, lane == 0);
            // These queries are read by all warps of the warpgroup: their tiles take the output.
            named_barrier_sync(1 + warpgroup, 128);
            const uint32_t fragment = Rows::fragment(staged, warp_row, lane);
            const int q = half * kTileRows + warp_row, query = q + quad + 8 * (pair & 1);
#pragma unroll
            for (int r = 0; r < kOwnRows; ++r) {
                const ItemRecord record = load_record<ItemRecord>(Tile::record(first_row + r, queries.stage));
                softmax[r].finish();
                if (record.source != nullptr)
                    apply_gate<T, kHeadDim>(o[r], static_cast<const T*>(record.source) + q * p.gate_stride.l,
                                            p.gate_stride.l, record.valid - q, p.head_dim, lane);
                const float sums[2] = {o[r][Values::kOutputTiles - 1][0], o[r][Values::kOutputTiles - 1][2]};
                const uint32_t from = r * 2 * Tile::kTileBytes;
                stage_rows<T, kHeadDim>(fragment + from, o[r], StaticSoftmax<T>::normaliser(sums[0]),
                                        StaticSoftmax<T>::normaliser(sums[1]));
                async_proxy_fence();
                warp_sync();
                if (lane == 0) {
                    tma_store(&p.o_map, staged + from + warp_row * Rows::kRowBytes, 0, record.first + q, record.head,
                              record.n, record.b);
                    tma_store_commit();
                }
                if (pair < 2 && query < record.valid) {
                    // Registers have no index.
                    const bool high = pair == 1;
                    const float sum = high ? sums[1] : sums[0];
                    record.vector_out[query] =
                        StaticSoftmax<T>::lse(high ? softmax[r].largest[1] : softmax[r].largest[0], sum);
                    const bool key_past_end = p.k_len % kTileRows != 0 &&
                                              lds_f32(Tile::refs(team, queries.stage) + query * 4) < kLowestStaticRef;
                    // A sum of 0 is right where the mask keeps no key.
                    if (key_past_end || (!StaticSoftmax<T>::in_range(sum) &&
                                         (sum != 0.f || p.row_kept[p.key_row(record.b, record.n)] != 0)))
                        p.redo[0] = p.redo[1 + record.index] = 1;
                }
            }
            stored = queries.empty();
            queries.advance();
        }
        tma_store_wait_read();
    }
}

}  // namespace ds4sci

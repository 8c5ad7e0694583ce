// SPDX-License-Identifier: Apache-2.0
// Forward on Hopper: o = softmax(scale q k^T + mask_bias + pair_bias) v for 128 queries of a few rows; with a gate
// times its sigmoid. With a pair bias up to head dim 32 fwd_two_row_kernel.cuh mostly takes its place (plan.h).
//
// No running maximum: P = exp2(s - c) with c the row maximum of the pair bias is exact softmax as long as P and its
// row sums stay in range. bf16 has fp32's range of exponents; fp16 has room for most rows. A row out of range marks
// its work item, and the same kernel with the online softmax, launched next, computes marked items again; it returns
// at once if there are none.
#pragma once
#include "bias.h"
#include "gate.h"
#include "sm90/key_stage.cuh"
#include "softmax.h"

namespace ds4sci {

// The softmax state of one warp's 16 rows without a running maximum, in place of OnlineSoftmax. The output is divided
// by the sums of the terms as rounded to T, which the product with V gives, so that a key with all the weight has
// weight 1. The backward pass rounds other numbers, so its lse wants the sums of the terms themselves, which would
// take an addition for every term. Where many keys have a weight, their roundings cancel out; where one has most of
// it, its own is all that counts. So the largest term is kept, at half an instruction for every term.
template <typename T>
struct StaticSoftmax {
    float largest[2];  // of this lane's terms of rows quad, quad + 8

    DS4SCI_DEVICE void reset() { largest[0] = largest[1] = 0.f; }
    DS4SCI_DEVICE void add(const float (&terms)[4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) largest[i] = max_of_non_negative(largest[i], terms[2 * i], terms[2 * i + 1]);
    }
    // Of 32 keys: a tree, whose instructions wait for each other less.
    DS4SCI_DEVICE void add(const float (&terms)[4][4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int low = 2 * i, high = 2 * i + 1;
            const float a = max_of_non_negative(terms[0][low], terms[0][high], terms[1][low]),
                        b = max_of_non_negative(terms[1][high], terms[2][low], terms[2][high]),
                        c = max_of_non_negative(terms[3][low], terms[3][high], largest[i]);
            largest[i] = max_of_non_negative(a, b, c);
        }
    }
    DS4SCI_DEVICE void finish() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                const float other = shfl_xor(largest[i], lanes);
                largest[i] = max_of_non_negative(largest[i], other, other);
            }
        }
    }
    // Of a row's sum of rounded terms: 1 / sum, 0 for a row without keys.
    DS4SCI_DEVICE static float normaliser(float sum) { return sum == 0.f ? 0.f : reciprocal_approx(sum); }
    // For the row's sum of rounded terms. Keys of one logit all round the same way: a row of nothing else is known by
    // its sum, a multiple of the largest term.
    DS4SCI_DEVICE static float lse(float largest, float rounded_sum) {
        const float rounded = unpack2<T>(pack2<T>(largest, largest)).x, factor = largest * reciprocal_approx(rounded);
        const float count = rintf(rounded_sum * reciprocal_approx(rounded));
        const bool equal = count * rounded == rounded_sum;
        return log2_approx(equal ? rounded_sum * factor : rounded_sum + (largest - rounded)) * kLn2;
    }
    // Whether neither the sum nor a term, rounded to T, has left T's range or lost digits there; false for NaN. In
    // bf16 the products with values of up to 2^67 stay finite.
    DS4SCI_DEVICE static bool in_range(float sum) {
        return kIsBf16<T> ? sum > 0x1p-80f && sum < 0x1p60f : sum > 0.5f && sum < 0x1p15f;
    }
};

// Rows whose bias lies further down are left to the online softmax if there are keys past the end: the bias of those
// reads as zero, so they would count.
constexpr float kLowestStaticRef = -1e20f;

// Whether the mask keeps any key of a warpgroup's row. A row without keys is 0, as it should be.
template <typename Tile>
DS4SCI_DEVICE bool keeps_a_key(const Sm90Params& p, int index, int warpgroup) {
    const WorkItem item =
        decode_work_item(index, ceil_div(p.q_len, Tile::kPositions), ceil_div(p.rows_per_group, Tile::kRows), p);
    const RowLocation row = RowLocation::of(p, item.group, item.row_block * Tile::kRows + warpgroup);
    return p.row_kept[p.key_row(row.b, row.n)] != 0;
}

// What a warpgroup needs to know of its queries of one row.
template <typename T>
DS4SCI_DEVICE void describe_queries(ItemRecord& record, const Sm90Params& p, const RowLocation& row,
                                    const RowCoordinates& at, int head, int q0) {
    record.source =
        p.gate == nullptr ? nullptr : row.template in<T>(p.gate, p.gate_stride, head) + q0 * p.gate_stride.l;
    record.vector_out = static_cast<float*>(p.lse) + row.head_row(p, head) * p.q_len + q0;
    record.valid = row.valid ? p.q_len - q0 : 0;
    record.first = q0, record.head = head, record.n = at.n, record.b = at.b;
}
// Both tiles of queries of a row.
template <typename Tile>
DS4SCI_DEVICE void load_query_tiles(const Sm90Params& p, uint32_t tile, uint32_t barrier, int q0, int head,
                                    const RowCoordinates& at) {
    tma_load(tile, &p.q_map, barrier, 0, q0, head, at.n, at.b);
    tma_load(tile + Tile::kTileBytes, &p.q_map, barrier, 0, q0 + kTileRows, head, at.n, at.b);
}

template <typename T, int kHeadDim, bool kPair, bool kOnline>
__global__ void __launch_bounds__(Sm90FwdTile<kHeadDim, kPair>::kThreads, 1)
    evoformer_sm90_fwd_kernel(const __grid_constant__ Sm90Params p, bool marked_items_only) {
    DS4SCI_DYNAMIC_SMEM(smem_base);
    using Tile = Sm90FwdTile<kHeadDim, kPair>;
    using Rows = RowTile<kHeadDim>;
    static_assert(Tile::kOwnBuffers > 1, "a buffer is handed back when the next item's operands are there");
    const int warp = warp_uniform(static_cast<int>(threadIdx.x / 32)), lane = threadIdx.x % 32;
    using Values = ValuesWithOnes<kHeadDim>;
    Values::template write_ones<T>(Tile::kOnesOffset, threadIdx.x, Tile::kThreads);
    async_proxy_fence();
    Tile::init(smem_base, true);
    if (marked_items_only && p.redo[0] == 0) return;
    auto ring = Tile::ring();

    auto skips = [&](int item) { return marked_items_only && p.redo[1 + item] == 0; };

    if (warp >= Tile::kConsumerWarps) {
        release_registers<Tile::kProducerRegisters>();
        if (warp != Tile::kConsumerWarps || lane != 0) return;
        const int num_q_blocks = ceil_div(p.q_len, Tile::kPositions);
        const int num_row_blocks = ceil_div(p.rows_per_group, Tile::kRows);
        typename Tile::OwnRing queries = Tile::own_ring(0);  // those of all warpgroups move together
        for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
            if (skips(index)) continue;
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
                record.index = index;
                describe_queries<T>(record, p, rows[r], at, item.head, q0);
                store_record(Tile::record(r, queries.stage), record);
                queries.announce(2 * Tile::kTileBytes + Tile::kRefsBytes);
                const uint32_t tile = Tile::own_tiles(r, queries.stage);
                load_query_tiles<Tile>(p, tile, queries.full(), q0, item.head, at);
                if (kPair)
                    bulk_load(Tile::refs(tile, r, queries.stage),
                              pair_row(p, kOnline ? p.pair_max : p.pair_ref, item) + q0, Tile::kRefsBytes,
                              queries.full());
            }
            queries.advance();
            stream_keys<Tile>(p, ring, rows, q0, item);
        }
    } else {
        take_registers<Tile::kConsumerRegisters>();
        const int warpgroup = warp / 4, warp_row = warp % 4 * 16, num_k_tiles = ceil_div(p.k_len, kTileRows);
        const int quad = lane >> 2, pair = lane & 3;
        // The query side of the auxiliary product: three ones.
        const uint32_t ones = pair == 0 ? 0x3f803f80u : pair == 1 ? 0x00003f80u : 0u;
        const uint32_t query_aux[4] = {ones, ones, 0u, 0u};
        // The online softmax counts in natural units; kUnit makes its powers those of kBiasLog2E, as the backward
        // pass's.
        constexpr float kUnit = kBiasLog2E<T> * kLn2;
        const float scale = p.softmax_scale * (kOnline ? kUnit : kBiasLog2E<T>);
        const MatrixOperand query_tiles = Rows::over_dim(Tile::own_tiles(warpgroup, 0));
        const MatrixOperand key_tiles = Rows::over_dim(Tile::key_tile(kSmemBase, warpgroup));
        const uint32_t value_tile = Tile::value_tile(kSmemBase, warpgroup);
        const MatrixOperand value_tiles = Rows::over_positions(value_tile);
        const Values values_with_ones = Values::of(value_tile, Tile::kOnesOffset);
        const MatrixOperand aux_tiles = aux_operand(Tile::aux_tile(kSmemBase, warpgroup));
        const uint32_t bias_tiles = kept(kSmemBase + bias_fragment(warp_row, lane));
        typename Tile::OwnRing queries = Tile::own_ring(warpgroup);
        uint32_t stored = 0;  // barrier of the queries in whose place the copy engine found the last output
        // Of the four blocks of a tile's bias, how many are read before the next product starts, if registers allow.
        constexpr int kEarlyBias = 3;

        for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
            if (skips(index)) continue;
            float o[2][kOnline ? kHeadDim / 8 : Values::kOutputTiles][4];
            // Of the static softmax: the rows' sums of the terms rounded to T, which the product with V takes. So a
            // key with all the weight has weight 1 in both passes, although its own term is no power of two.
            float rounded_sums[2][1][4];
            using Softmax = std::conditional_t<kOnline, OnlineSoftmax, StaticSoftmax<T>>;
            Softmax softmax[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                softmax[half].reset();
                zero_bias(o[half]);
                zero_bias(rounded_sums[half]);
            }
            queries.wait_full();
            tma_store_wait_read();
            mbarrier_arrive_if(stored, stored != 0);
            const uint32_t refs = Tile::refs(Tile::own_tiles(warpgroup, queries.stage), warpgroup, queries.stage) +
                                  (warp_row + quad) * 4;
            // Of queries quad and quad + 8 of this warp, in either tile.
            float ref[2][2] = {};
            if (kPair) {
#pragma unroll
                for (int i = 0; i < 4; ++i) ref[i / 2][i % 2] = lds_f32(refs + (i / 2 * kTileRows + i % 2 * 8) * 4);
            }
            const MatrixOperand query_tile = query_tiles.plus(queries.stage * Tile::kBufferBytes);
            auto start_logits = [&](float (&s)[8][4], int half, int stage) {
                const uint32_t offset = stage * Tile::kStageBytes;
                wgmma_fence();
                Rows::template product_abt<T>(s, query_tile.plus(half * Tile::kTileBytes), key_tiles.plus(offset));
                wgmma_rs<bf16, false>(s, query_aux, aux_tiles.plus(offset));
                wgmma_commit();
            };
            // This lane's part of the bias of one tile, blocks first to last - 1 of 16 keys.
            auto load_bias = [&](uint32_t (&bias)[4][4], int first, int last, int half, int stage) {
#pragma unroll
                for (int i = first; i < last; ++i)
                    ldmatrix_x4(bias[i], (bias_tiles + stage * Tile::kStageBytes + half * kBiasTileBytes) ^ (i * 32));
            };
            // Logits to unnormalised probabilities; for the online softmax, to logits with biases.
            auto add_bias = [&](float (&s)[8][4], const uint32_t (&bias)[4][4], int half, int valid_keys) {
                // The mask drops keys past the end, but their bias reads as zero, which may be 1e38 above the row's.
                // The static softmax leaves such rows to the online one.
                if (kPair && kOnline && valid_keys < kTileRows) drop_columns(s, valid_keys, lane);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    float (&x)[4] = s[j];
                    const float2 low = unpack2<T>(bias[j / 2][j % 2 * 2]),
                                 high = unpack2<T>(bias[j / 2][j % 2 * 2 + 1]);
                    const float b[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        if constexpr (kOnline) {
                            x[e] = fmaf(x[e], scale, (b[e] - ref[half][e / 2]) * kUnit);
                        } else {
                            x[e] = exp2_approx(kPair ? fmaf(x[e], scale, fmaf(b[e], kBiasLog2E<T>, -ref[half][e / 2]))
                                                     : x[e] * scale);
                        }
                    }
                    if constexpr (!kOnline) softmax[half].add(x);
                }
            };
            auto start_output = [&](float (&s)[8][4], uint32_t (&packed)[4][4], int half, int stage) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    pack_operand<T>(packed[i], s[2 * i], s[2 * i + 1]);
                }
                wgmma_fence();
                const uint32_t offset = stage * Tile::kStageBytes;
                if constexpr (kOnline) {
                    Rows::template product_pb<T>(o[half], packed, value_tiles.plus(offset));
                } else {
                    values_with_ones.plus(offset).template product<T>(o[half], rounded_sums[half], packed);
                }
                wgmma_commit();
            };
            auto output_complete = [&](int half) {
                wgmma_complete(o[half]);
                if constexpr (!kOnline && !Values::kOneOperand) wgmma_complete(rounded_sums[half]);
            };
            // Of the static softmax alone, so a template: the online one's output has no sums.
            auto row_sum = [&](auto half, int i) {
                return Values::kOneOperand ? o[half][Values::kOutputTiles - 1][2 * i] : rounded_sums[half][0][2 * i];
            };
            auto normaliser = [&](int half, int i) {
                if constexpr (kOnline) {
                    return softmax[half].normaliser(i);
                } else {
                    return Softmax::normaliser(row_sum(half, i));
                }
            };

            uint32_t finished_stage = 0;  // its values are read until the next wait
            if constexpr (kOnline) {
                for (int k_tile = 0; k_tile < num_k_tiles; ++k_tile) {
                    ring.wait_full();
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float s[8][4];
                        uint32_t packed[4][4], bias[4][4] = {};
                        if (kPair) load_bias(bias, 0, 4, half, ring.stage);
                        start_logits(s, half, ring.stage);
                        wgmma_wait<0>();  // the output is rescaled, so nothing may be on its way
                        wgmma_complete(s);
                        wgmma_complete(o[0]);
                        wgmma_complete(o[1]);
                        if (half == 0) mbarrier_arrive_if(finished_stage, k_tile > 0 && lane == 0);
                        add_bias(s, bias, half, p.k_len - k_tile * kTileRows);
                        softmax[half].update(s, o[half]);
                        start_output(s, packed, half, ring.stage);
                    }
                    finished_stage = ring.empty();
                    ring.advance();
                }
            } else {
                // While the exponentials of one tile of logits run, the tensor cores compute the next one and the
                // output of the one before.
                float s[2][8][4];
                ring.wait_full();
                start_logits(s[0], 0, ring.stage);
                wgmma_wait<0>();
                wgmma_complete(s[0]);
                for (int k_tile = 0; k_tile < num_k_tiles; ++k_tile) {
                    auto next = ring;
                    next.advance();
                    const bool last = k_tile + 1 == num_k_tiles;
                    // Asked for well before the answer is needed.
                    const uint32_t next_is_there = last ? 1 : next.test_full();
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        uint32_t packed[4][4], bias[4][4] = {};
                        if (kPair) load_bias(bias, 0, kEarlyBias, half, ring.stage);
                        if (half == 1) next.wait_full_unless(next_is_there);
                        // The last step computes a tile again that nobody reads: a product under a condition would
                        // serialise all.
                        start_logits(s[half ^ 1], half ^ 1, half == 0 || last ? ring.stage : next.stage);
                        if (kPair) load_bias(bias, kEarlyBias, 4, half, ring.stage);
                        add_bias(s[half], bias, half, p.k_len - k_tile * kTileRows);
                        wgmma_wait<1>();
                        output_complete(half ^ 1);
                        if (half == 0) mbarrier_arrive_if(finished_stage, k_tile > 0 && lane == 0);
                        start_output(s[half], packed, half, ring.stage);
                        wgmma_wait<1>();
                        wgmma_complete(s[half ^ 1]);
                    }
                    finished_stage = ring.empty();
                    ring = next;
                }
            }
            const ItemRecord record = load_record<ItemRecord>(Tile::record(warpgroup, queries.stage));
            wgmma_wait<0>();
            output_complete(0);
            output_complete(1);
            mbarrier_arrive_if(finished_stage, lane == 0);
            // Its queries are read by all warps of the warpgroup: their tiles take the output.
            named_barrier_sync(1 + warpgroup, 128);
            const uint32_t staged = Tile::own_tiles(warpgroup, queries.stage);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                softmax[half].finish();
                if (record.source != nullptr) {
                    const int q = half * kTileRows + warp_row;
                    apply_gate<T, kHeadDim>(o[half], static_cast<const T*>(record.source) + q * p.gate_stride.l,
                                            p.gate_stride.l, record.valid - q, p.head_dim, lane);
                }
                stage_rows<T, kHeadDim>(Rows::fragment(staged + half * Tile::kTileBytes, warp_row, lane), o[half],
                                        normaliser(half, 0), normaliser(half, 1));
            }
            start_query_stores<Rows>(p.o_map, staged, warp_row, record, lane);
            // Each lane of four has another query.
            const int half = pair / 2, high = pair % 2, q = half * kTileRows + warp_row + quad + 8 * high;
            if (q < record.valid) {
                // By value: registers have no index.
                const Softmax mine = half ? softmax[1] : softmax[0];
                if constexpr (kOnline) {
                    record.vector_out[q] = high ? mine.template lse<float>(1) : mine.template lse<float>(0);
                } else {
                    const float low_sum = half ? row_sum(1, 0) : row_sum(0, 0),
                                high_sum = half ? row_sum(1, 1) : row_sum(0, 1), sum = high ? high_sum : low_sum;
                    record.vector_out[q] = Softmax::lse(high ? mine.largest[1] : mine.largest[0], sum);
                    const bool key_past_end =
                        kPair && p.k_len % kTileRows != 0 &&
                        lds_f32(Tile::refs(staged, warpgroup, queries.stage) + q * 4) < kLowestStaticRef;
                    // A sum of 0 is right where the mask keeps no key.
                    if (key_past_end ||
                        (!Softmax::in_range(sum) && (sum != 0.f || keeps_a_key<Tile>(p, record.index, warpgroup))))
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

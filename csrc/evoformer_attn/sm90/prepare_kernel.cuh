// SPDX-License-Identifier: Apache-2.0
// One launch before the Hopper kernels, in the manner of ../prepare_kernel.cuh. Its blocks do one of four small
// things:
//   pair rows   pair_max  = row max of the pair bias, pair_ref, pair_ref_columns
//   key rows    key_aux   = key side of the auxiliary product (params.h), row_kept
//   vectors     query_aux = its query side                                              (backward)
//   marks       redo      = 0                                      (forward; factored sums of d(pair_bias))
#pragma once
#include "../prepare_kernel.cuh"
#include "sm90/params.h"
#include "sm90/ptx.h"

namespace ds4sci {

struct Sm90PrepareBlocks {
    int64_t pair, key, vectors, marks;

    DS4SCI_HOST_DEVICE static Sm90PrepareBlocks of(const Sm90Params& p) {
        Sm90PrepareBlocks blocks{0, 0, 0, 0};
        const PrepareBlocks portable = PrepareBlocks::of(p);
        blocks.pair = portable.pair;
        blocks.key = ceil_div<int64_t>(p.num_key_rows(), kPrepareWarps);
        if (p.query_aux != nullptr) blocks.vectors = VectorBlocks::of(p).count(p);
        if (p.redo != nullptr) blocks.marks = ceil_div<int64_t>(p.num_items + 1, kPrepareThreads);
        return blocks;
    }
};

// x as the sum of three bf16 values, to 24 bits.
struct Bf16Parts {
    float high, mid, low;

    DS4SCI_DEVICE static Bf16Parts of(float x) {
        Bf16Parts parts;
        parts.high = rounded(x);
        parts.mid = rounded(x - parts.high);
        parts.low = x - parts.high - parts.mid;
        return parts;
    }

  private:
    static DS4SCI_DEVICE float rounded(float x) { return unpack2<bf16>(pack2<bf16>(x, 0.f)).x; }
};

template <typename T>
DS4SCI_DEVICE void prepare_pair_refs(const Sm90Params& p, int64_t row, int lane) {
    if (row >= num_pair_rows(p)) return;
    const float reference = pair_reference<T>(p, row, lane);
    if (lane != 0) return;
    p.pair_max[row] = reference;
    const float scaled = fmaxf(reference * kBiasLog2E<T>, kLowestRef);
    p.pair_ref[row] = scaled;
    if (p.pair_ref_columns != nullptr) p.pair_ref_columns[(row & ~7) + (row & 1) * 4 + (row & 7) / 2] = scaled;
}

template <typename T>
DS4SCI_DEVICE void prepare_key_row(const Sm90Params& p, int64_t row, int lane) {
    if (row >= p.num_key_rows()) return;
    const float factor = 1.f / p.softmax_scale;
    auto write = [&](int key, float value) {
        const float scaled = value * factor;
        const Bf16Parts mask = Bf16Parts::of(scaled < kDropped ? kDropped : scaled);
        p.key_aux[row * p.k_len_padded + key] =
            make_uint4(pack2<bf16>(mask.high, mask.mid), pack2<bf16>(mask.low, 1.f), pack2<bf16>(1.f, 1.f),
                       pack2<bf16>(1.f, 1.f));
    };
    float maximum = 0.f;
    if (p.mask_bias != nullptr) {
        maximum = visit_mask_row<T>(p, row, lane, write);
    } else {
        for (int key = lane; key < p.k_len_padded; key += 32) write(key, key < p.k_len ? 0.f : -INFINITY);
    }
    if (p.row_kept != nullptr && lane == 0) p.row_kept[row] = maximum != -INFINITY;
}

template <typename T>
DS4SCI_DEVICE void prepare_query_aux(const Sm90Params& p, uint32_t block, int thread) {
    visit_row_stats<T>(p, block, thread, [&](int64_t index, float natural_lse, float delta) {
        // In the units that S has before it is multiplied by softmax_scale * kBiasLog2E.
        const float scaled = natural_lse * (kLog2E / kBiasLog2E<T>) / p.softmax_scale;
        const Bf16Parts lse = Bf16Parts::of(scaled > -kDropped ? kDropped : -scaled);
        const Bf16Parts minus_delta = Bf16Parts::of(-delta);
        p.query_aux[index] = make_uint4(pack2<bf16>(1.f, 1.f), pack2<bf16>(1.f, lse.high),
                                        pack2<bf16>(lse.mid, lse.low), pack2<bf16>(minus_delta.high, minus_delta.mid));
    });
}

// kVectors: whether any block has vectors. Behind blocks with the registers that those take, the forward, which has
// none, ended 5 us later.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kPrepareThreads) sm90_prepare_kernel(const __grid_constant__ Sm90Params p) {
    wait_for_previous_kernels();
    let_next_kernel_start();
    const Sm90PrepareBlocks blocks = Sm90PrepareBlocks::of(p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t block = blockIdx.x;
    if (block < blocks.pair) return prepare_pair_refs<T>(p, block * kPrepareWarps + warp, lane);
    block -= blocks.pair;
    if (block < blocks.key) return prepare_key_row<T>(p, block * kPrepareWarps + warp, lane);
    block -= blocks.key;
    if constexpr (kVectors) {
        if (block < blocks.vectors) return prepare_query_aux<T>(p, static_cast<uint32_t>(block), threadIdx.x);
    }
    block -= blocks.vectors;
    const int64_t mark = block * kPrepareThreads + threadIdx.x;
    if (mark <= p.num_items) p.redo[mark] = 0;
}

}  // namespace ds4sci

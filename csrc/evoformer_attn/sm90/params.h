// SPDX-License-Identifier: Apache-2.0
// What the Hopper kernels receive: the portable kernels' parameters, tensor maps for the copy engine, and the biases
// and statistics in the form that the tensor cores add them.
//
// S = Q K^T and dP = dO V^T get one more product of depth 16, of 8 values per query and 8 per key:
//     query side [1, 1, 1, -lse hi, -lse mid, -lse low, -delta hi, -delta low]     (forward: the three ones alone)
//     key side   [mask hi, mask mid, mask low, 1, 1, 1, 1, 1]
// S takes the first six, which add mask - lse, and dP the last two. So the threads that compute exponentials are
// spared all of it. Three bf16 values carry the 24 bits of an fp32 value, two of them 16, enough for delta beside a dP
// of 16-bit operands. mask and lse are divided by the softmax scale, by which S is multiplied afterwards. A dropped
// key and a row without keys are kDropped: finite, since 0 * inf would be NaN, and far below what exp2 takes for zero.
#pragma once
#include <cuda.h>

#include "kernel_params.h"

namespace ds4sci {

constexpr float kDropped = -1e38f;

// log2(e) in so few digits that its product with a 16-bit bias is exact in fp32. So bias * log2(e) - pair_ref is the
// difference of the two biases times a constant, also at -1e9, where rounding either product would be off by whole
// units. All exponentials, forward and backward, take this constant for log2(e): a softmax whose temperature is off by
// less than 2^-17 (bf16) or 2^-14 (fp16).
template <typename T>
constexpr float kBiasLog2E = 47274.f / 32768.f;
template <>
constexpr float kBiasLog2E<fp16> = 5909.f / 4096.f;
// pair_ref may not overflow: a row whose every bias is below about -2e38 has zero gradients.
constexpr float kLowestRef = -3e38f;

// Up to this head dim dK/dV reads pair_ref_columns, by ldmatrix; above it pair_ref.
constexpr int kColumnRefsHeadDim = 32;

struct Sm90Params : KernelParams {
    // [D, L, H, N, B] in tiles of 64 positions; the pair bias [Lk, Lq, H, B] in tiles of 64 x 64. For the kernel of
    // dQ, dK and dV those of queries are 32 high.
    CUtensorMap q_map, k_map, v_map, d_o_map, pair_map;
    // What is written, 16 positions at a time.
    CUtensorMap o_map, dq_map, dk_map, dv_map;
    float* pair_ref;  // pair_max * kBiasLog2E, which the exponentials subtract; same layout
    // Backward up to kColumnRefsHeadDim: the same, of every eight queries those with even numbers first: with four
    // lanes to a row of results, each of two queries, ldmatrix gives a lane its two.
    float* pair_ref_columns;
    uint4* key_aux;      // [mask_batch, mask_rows, k_len_padded]; [1, 1, k_len_padded] without a mask
    uint4* query_aux;    // backward: [B, N, H, q_len_padded]
    float* dq_scratch;   // backward: [blocks, q_len_padded, padded head dim], a block's sums between two passes
    uint32_t* row_kept;  // forward: [mask_batch, mask_rows], whether the mask keeps any key
    // Forward: [1 + items of fwd_kernel.cuh]: whether, and what, the static softmax leaves to the online one.
    // Backward: [1 + blocks of d(pair_bias)], the first unused: which of them factored sums leave to whole ones; null
    // without.
    uint32_t* redo;
    // The kernel launched before is the one that prepares the operands. Else it is a sibling that has waited for that
    // one and whose results this kernel does not read, so it may start beside it.
    bool follows_prepare;
    int32_t num_items;  // work items of the kernel

    DS4SCI_HOST_DEVICE int64_t num_key_rows() const {
        return mask_bias == nullptr ? 1 : static_cast<int64_t>(mask_batch) * mask_rows;
    }
    // Index of the mask row of one row (b, n).
    DS4SCI_HOST_DEVICE int64_t key_row(int b, int n) const {
        if (mask_bias == nullptr) return 0;
        return (mask_batch == 1 ? 0 : b) * static_cast<int64_t>(mask_rows) + (mask_rows == 1 ? 0 : n);
    }
};

// One of the row vectors of the pair bias, pair_max, pair_ref or pair_ref_columns, of a work item.
DS4SCI_DEVICE const float* pair_row(const Sm90Params& p, const float* vectors, const WorkItem& item) {
    return vectors + (pair_max_of(p, item.group, item.head) - p.pair_max);
}

}  // namespace ds4sci

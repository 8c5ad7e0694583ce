// SPDX-License-Identifier: Apache-2.0
// What kernels receive: the caller's parameters plus the prepared operands in the workspace, and the work-item order.
#pragma once
#include <cmath>

#include "device.h"
#include "params.h"

namespace ds4sci {

// Lengths in the workspace are padded to this, so that every tile of every kernel may read whole.
constexpr int kLengthPadding = 128;

struct KernelParams : EvoformerParams {
    float* mask;        // [mask_batch, mask_rows, k_len_padded]: mask - row max; -inf: dropped; null: no mask
    float* pair_max;    // [pair_batch, pair_heads, q_len_padded]: row max of the pair bias; null: no pair bias
    float2* row_stats;  // backward: [B, N, H, q_len_padded] of {lse * log2(e), delta}; {+inf, 0} where P must be 0
    float* lse_low;     // backward, fp32 problems: what rounding lse * log2(e) to fp32 left over, same layout
    void* gated_d_o;    // backward with a gate: [B, N, Lq, H, D] contiguous, sigmoid(gate) * d_o; null without
    int32_t q_len_padded, k_len_padded;
    bool heads_before_rows;              // order of work items, see decode_work_item
    int32_t num_groups, rows_per_group;  // rows of one group share a pair bias: N rows of a sample, or all B * N rows

    DS4SCI_HOST_DEVICE bool pair_is_fp32() const { return pair_dtype == kFloat32; }
    DS4SCI_HOST_DEVICE int pair_element_bytes() const { return pair_bias == nullptr ? 0 : pair_is_fp32() ? 4 : 2; }
};

// Elements of d(pair_bias), before it is added up over samples or heads that share a bias.
DS4SCI_HOST_DEVICE constexpr int64_t dpair_elements(const KernelParams& p) {
    return static_cast<int64_t>(p.num_groups) * p.heads * p.q_len * p.k_len;
}

template <typename T>
struct LseType {
    using type = float;
};
template <>
struct LseType<float> {
    using type = double;
};

// exp(x - lse) with lse in log2 units; fp32 problems subtract in two steps.
template <typename T>
DS4SCI_DEVICE float probability(float x, float lse_log2, float lse_log2_low) {
    const float difference = fmaf(x, kLog2E, -lse_log2);
    if constexpr (sizeof(T) == 4) return exp2_approx(difference - lse_log2_low);
    return exp2_approx(difference);
}

// Position of one thread block: which tile of which rows. Tiles run fastest, so that blocks that run together share K
// and V. Heads are next, since neighbouring heads are neighbours in memory and one read from there serves both; but
// where the bias of all heads would fill L2, row blocks are, so that one head's bias stays there.
struct WorkItem {
    int tile, row_block, head, group;
};

DS4SCI_DEVICE WorkItem decode_work_item(uint32_t block, int num_tiles, int num_row_blocks, const KernelParams& p) {
    WorkItem item;
    item.tile = static_cast<int>(block % num_tiles);
    block /= num_tiles;
    const int inner = p.heads_before_rows ? p.heads : num_row_blocks;
    const int outer = p.heads_before_rows ? num_row_blocks : p.heads;
    const int first = static_cast<int>(block % inner);
    block /= inner;
    const int second = static_cast<int>(block % outer);
    item.group = static_cast<int>(block / outer);
    item.head = p.heads_before_rows ? first : second;
    item.row_block = p.heads_before_rows ? second : first;
    return item;
}
// The other way.
DS4SCI_DEVICE int encode_work_item(const WorkItem& item, int num_tiles, int num_row_blocks, const KernelParams& p) {
    const int inner = p.heads_before_rows ? p.heads : num_row_blocks;
    const int outer = p.heads_before_rows ? num_row_blocks : p.heads;
    const int first = p.heads_before_rows ? item.head : item.row_block;
    const int second = p.heads_before_rows ? item.row_block : item.head;
    return ((item.group * outer + second) * inner + first) * num_tiles + item.tile;
}

// One row (b, n) of the problem: where its tensors begin.
struct RowLocation {
    int b, n;
    bool valid;

    DS4SCI_DEVICE static RowLocation of(const KernelParams& p, int group, int row_in_group) {
        RowLocation location;
        location.valid = row_in_group < p.rows_per_group;
        const int row = group * p.rows_per_group + (location.valid ? row_in_group : 0);
        location.b = row / p.rows;
        location.n = row % p.rows;
        return location;
    }
    DS4SCI_DEVICE void advance(const KernelParams& p) {
        if (++n == p.rows) {
            n = 0;
            ++b;
        }
    }
    template <typename T>
    DS4SCI_DEVICE const T* in(const void* base, const RowStrides& stride, int head) const {
        return static_cast<const T*>(base) + b * stride.b + n * stride.n + head * stride.h;
    }
    // Contiguous [B, N, length, H, D] output.
    template <typename T>
    DS4SCI_DEVICE T* out(const KernelParams& p, void* base, int length, int head) const {
        return static_cast<T*>(base) + ((flat(p) * length) * p.heads + head) * p.head_dim;
    }
    // Index of [B, N, H] for this row and head.
    DS4SCI_DEVICE int64_t head_row(const KernelParams& p, int head) const { return flat(p) * p.heads + head; }
    DS4SCI_DEVICE const float* mask_of(const KernelParams& p) const {
        const int64_t row =
            (p.mask_batch == 1 ? 0 : b) * static_cast<int64_t>(p.mask_rows) + (p.mask_rows == 1 ? 0 : n);
        return p.mask + row * p.k_len_padded;
    }

  private:
    DS4SCI_DEVICE int64_t flat(const KernelParams& p) const { return static_cast<int64_t>(b) * p.rows + n; }
};

// Offsets of the pair bias and its row maxima for one (group, head).
DS4SCI_DEVICE int64_t pair_offset(const KernelParams& p, int group, int head) {
    return (p.pair_batch == 1 ? 0 : group) * p.pair_stride_b + (p.pair_heads == 1 ? 0 : head) * p.pair_stride_h;
}
DS4SCI_DEVICE const float* pair_max_of(const KernelParams& p, int group, int head) {
    const int64_t row =
        (p.pair_batch == 1 ? 0 : group) * static_cast<int64_t>(p.pair_heads) + (p.pair_heads == 1 ? 0 : head);
    return p.pair_max + row * p.q_len_padded;
}

}  // namespace ds4sci

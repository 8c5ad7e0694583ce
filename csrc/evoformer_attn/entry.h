// SPDX-License-Identifier: Apache-2.0
// What the entry points of all architectures share: checks of what would corrupt memory, and the workspace.
#pragma once
#include <initializer_list>

#include "launch.h"
#include "static_switch.h"

namespace ds4sci {

constexpr int64_t kWorkspaceAlignment = 256;

// Hands out the pieces of the workspace in order; with a null base it only counts.
struct WorkspaceCursor {
    unsigned char* base;
    int64_t used = 0;

    template <typename Value>
    Value* take(int64_t count) {
        Value* piece = base == nullptr ? nullptr : reinterpret_cast<Value*>(base + used);
        used += round_up<int64_t>(count * static_cast<int64_t>(sizeof(Value)), kWorkspaceAlignment);
        return piece;
    }
};

// The parts that need no workspace.
inline KernelParams basic_kernel_params(const EvoformerParams& params) {
    KernelParams p{};
    static_cast<EvoformerParams&>(p) = params;
    p.q_len_padded = round_up(p.q_len, kLengthPadding);
    p.k_len_padded = round_up(p.k_len, kLengthPadding);
    // Without a pair bias, or with one shared by all samples, every row of the batch belongs to one group.
    const bool one_group = p.pair_bias == nullptr || p.pair_batch == 1;
    p.num_groups = one_group ? 1 : p.batch;
    p.rows_per_group = one_group ? p.batch * p.rows : p.rows;
    // Two fifths of the smallest L2 that matters here, an A100's.
    constexpr int64_t kResidentBiasBytes = static_cast<int64_t>(16) << 20;
    const int64_t bias_bytes = static_cast<int64_t>(p.pair_heads) * p.q_len * p.k_len * p.pair_element_bytes();
    p.heads_before_rows = p.pair_bias == nullptr || bias_bytes <= kResidentBiasBytes;
    return p;
}

// Backward with a gate: room for what the prepare step makes of d_o.
inline void take_gated_d_o(KernelParams& p, WorkspaceCursor& cursor) {
    if (p.gate == nullptr) return;
    const int64_t elements = static_cast<int64_t>(p.batch) * p.rows * p.q_len * p.heads * p.head_dim;
    p.gated_d_o = cursor.take<unsigned char>(elements * (p.dtype == kFloat32 ? 4 : 2));
}
// After it the main kernels read that in place of d_o.
inline void read_gated_d_o(KernelParams& p) {
    if (p.gate == nullptr) return;
    const int64_t l = static_cast<int64_t>(p.heads) * p.head_dim, n = l * p.q_len;
    p.d_o = p.gated_d_o;
    p.d_o_stride = {n * p.rows, n, l, p.head_dim};
}

inline int32_t check(const EvoformerParams& p) {
    const int elements_per_chunk = p.dtype == kFloat32 ? 4 : 8;
    if (p.head_dim < 1 || p.head_dim > 128 || p.head_dim % elements_per_chunk != 0) return kInvalidHeadDim;
    if (p.dtype != kFloat16 && p.dtype != kBFloat16 && p.dtype != kFloat32) return kInvalidDtype;
    if (p.mask_bias != nullptr && p.mask_dtype != p.dtype && p.mask_dtype != kFloat32 && p.mask_dtype != kBool)
        return kInvalidDtype;
    if (p.pair_bias != nullptr && p.pair_dtype != p.dtype && p.pair_dtype != kFloat32) return kInvalidDtype;
    if (p.batch < 1 || p.rows < 1 || p.q_len < 1 || p.k_len < 1 || p.heads < 1) return kInvalidArgument;
    if (static_cast<int64_t>(p.batch) * p.rows > 2147483647) return kInvalidArgument;
    for (const RowStrides* stride : {&p.q_stride, &p.k_stride, &p.v_stride, &p.d_o_stride}) {
        if (stride->l < 0 || stride->l > 2147483647) return kInvalidArgument;
    }
    return 0;
}

inline bool wants_dpair(const EvoformerParams& p) { return p.dpair_bias != nullptr || p.dpair_out != nullptr; }

inline int32_t check_backward(const EvoformerParams& p) {
    if (const int32_t status = check(p)) return status;
    if (wants_dpair(p) && (p.pair_bias == nullptr || p.dpair_splits < 1)) return kInvalidArgument;
    if ((p.dk == nullptr) != (p.dv == nullptr)) return kInvalidArgument;
    if (p.d_gate != nullptr && p.gate == nullptr) return kInvalidArgument;
    return 0;
}

// d(pair_bias) from its shares, where the caller wants it.
inline cudaError_t finish_dpair(const KernelParams& p) {
    if (p.dpair_out == nullptr || p.dpair_bias == nullptr) return cudaSuccess;
    if (p.pair_dtype == kFloat32) return run_finish_dpair<float>(p);
    return p.dtype == kFloat16 ? run_finish_dpair<fp16>(p) : run_finish_dpair<bf16>(p);
}

}  // namespace ds4sci

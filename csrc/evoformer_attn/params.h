// SPDX-License-Identifier: Apache-2.0
// The C interface of the compiled library: one plain struct in, one status out. No torch, no C++ types.
// deepspeed_ds4sci/ops/_params.py mirrors this struct field by field; ds4sci_evoformer_params_size() guards the
// copy.
//
// Axes: B batch, N rows that do not attend to each other, Lq / Lk attended lengths, H heads, D head dim. Strides count
// elements.
#pragma once
#include <cstdint>

namespace ds4sci {

enum DataType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kBool = 3 };

struct RowStrides {
    int64_t b, n, l, h;  // the head dim has stride 1; each stride is a multiple of 16 bytes
};

struct EvoformerParams {
    const void* q;          // [B, N, Lq, H, D]
    const void* k;          // [B, N, Lk, H, D]
    const void* v;          // [B, N, Lk, H, D]
    const void* mask_bias;  // [B|1, N|1, Lk], dtype of q, fp32 or bool (true = keep); null when absent
    // [B|1, H|1, Lq, Lk], dtype of q or fp32, keys contiguous; null when absent. Rows start at multiples of 16 bytes
    // and may be read up to the next one.
    const void* pair_bias;
    const void* gate;  // [B, N, Lq, H, D], dtype of q: o is multiplied by its sigmoid; null when absent
    void* o;           // [B, N, Lq, H, D] contiguous; written by forward, read by backward
    // [B, N, H, Lq] natural log, relative to the row maxima of both biases; -inf: no key left. fp32, for fp32 problems
    // fp64: exp(x - lse) turns the rounding of lse into an error of every probability of the row.
    void* lse;

    // Backward only. A null output is neither computed nor written.
    const void* d_o;    // [B, N, Lq, H, D]
    void* d_gate;       // [B, N, Lq, H, D] contiguous, dtype of q
    void* dq;           // [B, N, Lq, H, D] contiguous
    void* dk;           // [B, N, Lk, H, D] contiguous; dk and dv come together
    void* dv;           // [B, N, Lk, H, D] contiguous
    float* dpair_bias;  // [dpair_splits, B|1, H, Lq, Lk]: partial sums over rows, to be added in order
    float* dmask_bias;  // [B, N, H, Lk]: sums over queries, to be added over heads
    // [B|1, H, Lq, Lk], dtype of pair_bias: the partial sums added up and rounded. Null: dpair_bias is the result. The
    // Hopper kernels need no dpair_bias for it where dpair_splits is 1.
    void* dpair_out;
    void* workspace;  // ds4sci_evoformer_workspace_bytes() bytes, 256-byte aligned
    void* stream;     // cudaStream_t

    RowStrides q_stride, k_stride, v_stride, gate_stride, d_o_stride;
    int64_t mask_stride_b, mask_stride_n, mask_stride_k;
    int64_t pair_stride_b, pair_stride_h, pair_stride_q;

    int32_t batch, rows, q_len, k_len, heads, head_dim;  // head_dim: multiple of 8 (16-bit) or 4 (fp32), at most 128
    int32_t dtype, mask_dtype, pair_dtype;               // DataType
    int32_t mask_batch, mask_rows;                       // 1 or batch, 1 or rows
    int32_t pair_batch, pair_heads;                      // 1 or batch, 1 or heads
    int32_t dpair_splits;
    float softmax_scale;
};

}  // namespace ds4sci

extern "C" {
// sizeof(EvoformerParams) in this build.
int64_t ds4sci_evoformer_params_size();
// Scratch memory of one call, bytes.
int64_t ds4sci_evoformer_workspace_bytes(const ds4sci::EvoformerParams* params, int32_t backward);
// How many ways the pair-bias gradient splits its sum over rows on a GPU with num_sms multiprocessors.
int32_t ds4sci_evoformer_dpair_splits(const ds4sci::EvoformerParams* params, int32_t num_sms);
// 0, a positive cudaError_t, or a negative code for an argument that no kernel takes.
int32_t ds4sci_evoformer_fwd(const ds4sci::EvoformerParams* params);
int32_t ds4sci_evoformer_bwd(const ds4sci::EvoformerParams* params);
const char* ds4sci_evoformer_status_string(int32_t status);
}

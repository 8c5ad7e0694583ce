// SPDX-License-Identifier: Apache-2.0
// Tensor maps: how the copy engine finds tiles of strided tensors. Encoded on the host for every call, about a
// microsecond each. The driver's encoder is found through the runtime, so nothing links against the driver library.
#pragma once
#include <cudaTypedefs.h>

#include "sm90/tile.h"

namespace ds4sci {

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const auto encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        const cudaError_t status =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(status == cudaSuccess ? function : nullptr);
    }();
    return encoder;
}

struct MapAxis {
    int64_t size, stride;  // elements; the first axis has stride 1
};

// A map of 16-bit elements whose box covers `box_columns` x `box_rows` of the first two axes, rows swizzled over their
// width of 2 * box_columns bytes.
template <int kAxes>
cudaError_t encode_map(CUtensorMap* map, int32_t dtype, const void* data, const MapAxis (&axes)[kAxes],
                       int box_columns, int box_rows) {
    const auto encoder = tensor_map_encoder();
    if (encoder == nullptr) return cudaErrorNotSupported;
    cuuint64_t sizes[kAxes], strides[kAxes - 1];
    cuuint32_t box[kAxes], steps[kAxes];
    for (int i = 0; i < kAxes; ++i) {
        sizes[i] = axes[i].size;
        // An axis of one element may have any stride, also one that the engine would refuse.
        if (i > 0) strides[i - 1] = axes[i].size == 1 ? 16 : axes[i].stride * 2;
        box[i] = i == 0 ? box_columns : i == 1 ? box_rows : 1;
        steps[i] = 1;
    }
    const CUtensorMapSwizzle swizzle = box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                           : CU_TENSOR_MAP_SWIZZLE_32B;
    const CUtensorMapDataType type =
        dtype == kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    // No more than a row at a time from memory: what lies beside it is another head's, perhaps wanted much later.
    const CUresult status =
        encoder(map, type, kAxes, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_64B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t encode_rows(CUtensorMap* map, const KernelParams& p, const void* data, const RowStrides& stride,
                               int length, int padded_head_dim, int box_rows) {
    const MapAxis axes[] = {
        {p.head_dim, 1}, {length, stride.l}, {p.heads, stride.h}, {p.rows, stride.n}, {p.batch, stride.b}};
    return encode_map(map, p.dtype, data, axes, padded_head_dim, box_rows);
}

// Nothing to encode without a pair bias.
inline cudaError_t encode_pair(CUtensorMap* map, const KernelParams& p, int box_rows) {
    if (p.pair_bias == nullptr) return cudaSuccess;
    const MapAxis axes[] = {
        {p.k_len, 1}, {p.q_len, p.pair_stride_q}, {p.pair_heads, p.pair_stride_h}, {p.pair_batch, p.pair_stride_b}};
    return encode_map(map, p.dtype, p.pair_bias, axes, 64, box_rows);
}

// Of a result, which is contiguous; nothing to encode if it is null.
inline cudaError_t encode_result(CUtensorMap* map, const KernelParams& p, const void* data, int length,
                                 int padded_head_dim) {
    if (data == nullptr) return cudaSuccess;
    const int64_t position = static_cast<int64_t>(p.heads) * p.head_dim, row = position * length;
    const MapAxis axes[] = {
        {p.head_dim, 1}, {length, position}, {p.heads, p.head_dim}, {p.rows, row}, {p.batch, row * p.rows}};
    return encode_map(map, p.dtype, data, axes, padded_head_dim, kStoredRows);
}

// What kernels read of the queries, `rows` of them at a time. d_o is null in the forward pass.
inline cudaError_t encode_query_maps(Sm90Params& p, int padded_head_dim, int rows) {
    cudaError_t status = encode_rows(&p.q_map, p, p.q, p.q_stride, p.q_len, padded_head_dim, rows);
    if (status == cudaSuccess && p.d_o != nullptr)
        status = encode_rows(&p.d_o_map, p, p.d_o, p.d_o_stride, p.q_len, padded_head_dim, rows);
    if (status == cudaSuccess) status = encode_pair(&p.pair_map, p, rows);
    return status;
}

// All maps of a call.
inline cudaError_t encode_maps(Sm90Params& p, int padded_head_dim, int query_rows = kTileRows) {
    // The encoder needs a current context, which a thread that only launched kernels so far, as autograd's, lacks.
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaSetDevice(device);
    if (status == cudaSuccess) status = encode_query_maps(p, padded_head_dim, query_rows);
    if (status == cudaSuccess) status = encode_rows(&p.k_map, p, p.k, p.k_stride, p.k_len, padded_head_dim, kTileRows);
    if (status == cudaSuccess) status = encode_rows(&p.v_map, p, p.v, p.v_stride, p.k_len, padded_head_dim, kTileRows);
    if (p.d_o == nullptr) {
        if (status == cudaSuccess) status = encode_result(&p.o_map, p, p.o, p.q_len, padded_head_dim);
    } else {
        if (status == cudaSuccess) status = encode_result(&p.dq_map, p, p.dq, p.q_len, padded_head_dim);
        if (status == cudaSuccess) status = encode_result(&p.dk_map, p, p.dk, p.k_len, padded_head_dim);
        if (status == cudaSuccess) status = encode_result(&p.dv_map, p, p.dv, p.k_len, padded_head_dim);
    }
    return status;
}

}  // namespace ds4sci

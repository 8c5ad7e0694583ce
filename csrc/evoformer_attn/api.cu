// SPDX-License-Identifier: Apache-2.0
// The library's entry points: check what would corrupt memory, lay out the workspace, dispatch on dtype and head dim.
#include "entry.h"
#include "launch.h"

namespace ds4sci {
namespace {

KernelParams make_kernel_params(const EvoformerParams& params, bool backward, int64_t* workspace_bytes) {
    KernelParams p = basic_kernel_params(params);
    WorkspaceCursor cursor{static_cast<unsigned char*>(params.workspace)};
    if (p.mask_bias != nullptr)
        p.mask = cursor.take<float>(static_cast<int64_t>(p.mask_batch) * p.mask_rows * p.k_len_padded);
    if (p.pair_bias != nullptr)
        p.pair_max = cursor.take<float>(static_cast<int64_t>(p.pair_batch) * p.pair_heads * p.q_len_padded);
    if (backward) {
        const int64_t vectors = static_cast<int64_t>(p.batch) * p.rows * p.heads * p.q_len_padded;
        p.row_stats = cursor.take<float2>(vectors);
        if (p.dtype == kFloat32) p.lse_low = cursor.take<float>(vectors);
        take_gated_d_o(p, cursor);
    }
    if (workspace_bytes != nullptr) *workspace_bytes = cursor.used;
    return p;
}

}  // namespace
}  // namespace ds4sci

using namespace ds4sci;

extern "C" int64_t ds4sci_evoformer_params_size() { return sizeof(EvoformerParams); }

extern "C" int64_t ds4sci_evoformer_workspace_bytes(const EvoformerParams* params, int32_t backward) {
    int64_t bytes = 0;
    make_kernel_params(*params, backward != 0, &bytes);
    return bytes;
}

extern "C" int32_t ds4sci_evoformer_dpair_splits(const EvoformerParams* params, int32_t num_sms) {
    if (params->pair_bias == nullptr) return 1;
    const KernelParams p = make_kernel_params(*params, true, nullptr);
    const int64_t blocks =
        static_cast<int64_t>(ceil_div(p.q_len, 64)) * ceil_div(p.k_len, 64) * p.heads * p.num_groups;
    // Enough blocks to fill the machine; but each share costs an fp32 copy of the gradient, so at most 64 MiB of them.
    const int64_t wanted = ceil_div<int64_t>(4 * static_cast<int64_t>(num_sms), blocks);
    const int64_t copy_bytes = static_cast<int64_t>(p.num_groups) * p.heads * p.q_len * p.k_len * 4;
    const int64_t affordable = (static_cast<int64_t>(64) << 20) / copy_bytes;
    int64_t splits = wanted < affordable ? wanted : affordable;
    if (splits > p.rows_per_group) splits = p.rows_per_group;
    return splits < 1 ? 1 : static_cast<int32_t>(splits);
}

extern "C" int32_t ds4sci_evoformer_fwd(const EvoformerParams* params) {
    if (const int32_t status = check(*params)) return status;
    const KernelParams p = make_kernel_params(*params, false, nullptr);
    return DS4SCI_DTYPE_SWITCH(p.dtype, [&] {
        return DS4SCI_HEAD_DIM_SWITCH(p.head_dim, [&] {
            cudaError_t status = run_prepare<T>(p);
            if (status == cudaSuccess) status = run_evoformer_fwd<T, kHeadDim>(p);
            return static_cast<int32_t>(status);
        });
    });
}

extern "C" int32_t ds4sci_evoformer_bwd(const EvoformerParams* params) {
    if (const int32_t status = check_backward(*params)) return status;
    if (params->dpair_out != nullptr && params->dpair_bias == nullptr) return kInvalidArgument;
    KernelParams p = make_kernel_params(*params, true, nullptr);
    return DS4SCI_DTYPE_SWITCH(p.dtype, [&] {
        return DS4SCI_HEAD_DIM_SWITCH(p.head_dim, [&] {
            cudaError_t status = run_prepare<T>(p);
            read_gated_d_o(p);
            if (status == cudaSuccess && p.dpair_bias != nullptr) status = run_evoformer_bwd_dpair<T, kHeadDim>(p);
            if (status == cudaSuccess && p.dq != nullptr) status = run_evoformer_bwd_dq<T, kHeadDim>(p);
            if (status == cudaSuccess && (p.dk != nullptr || p.dmask_bias != nullptr)) {
                status = run_evoformer_bwd_dkv<T, kHeadDim>(p);
            }
            if (status == cudaSuccess) status = finish_dpair(p);
            return static_cast<int32_t>(status);
        });
    });
}

extern "C" const char* ds4sci_evoformer_status_string(int32_t status) {
    switch (status) {
        case kInvalidHeadDim:
            return "head_dim must be a multiple of 16 bytes, at most 128 elements";
        case kInvalidDtype:
            return "dtype of q or of a bias is not one the kernels take";
        case kInvalidArgument:
            return "a size is not positive, a stride above 2^31, or an output misses its input";
        default:
            return cudaGetErrorString(static_cast<cudaError_t>(status));
    }
}

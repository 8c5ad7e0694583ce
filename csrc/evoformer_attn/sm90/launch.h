// SPDX-License-Identifier: Apache-2.0
// What api_sm90.cu calls; defined in launch.cuh, instantiated in ../instantiations/.
#pragma once
#include "sm90/params.h"

namespace ds4sci {

inline cudaError_t count_multiprocessors(int32_t* num_sms) {
    int device = 0;
    const cudaError_t status = cudaGetDevice(&device);
    return status == cudaSuccess ? cudaDeviceGetAttribute(num_sms, cudaDevAttrMultiProcessorCount, device) : status;
}

// Rows that one block of fwd_kernel.cuh handles at once, by whose work items marks are counted.
constexpr int sm90_rows_per_block(int head_dim) { return head_dim <= 32 ? 3 : 2; }

template <typename T>
cudaError_t run_sm90_prepare(const Sm90Params& p);
template <typename T, int kHeadDim>
cudaError_t run_sm90_fwd(const Sm90Params& p);
template <typename T, int kHeadDim>
cudaError_t run_sm90_bwd_dq(const Sm90Params& p);
template <typename T, int kHeadDim>
cudaError_t run_sm90_bwd_dkv(const Sm90Params& p);
template <typename T, int kHeadDim>
cudaError_t run_sm90_bwd_dqkv(const Sm90Params& p);
template <typename T, int kHeadDim>
cudaError_t run_sm90_bwd_dpair(const Sm90Params& p);
// The blocks that it marked, again. After all kernels that may run beside it.
template <typename T, int kHeadDim>
cudaError_t run_sm90_bwd_marked_dpair(const Sm90Params& p);

}  // namespace ds4sci

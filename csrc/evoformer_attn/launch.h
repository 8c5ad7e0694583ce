// SPDX-License-Identifier: Apache-2.0
// What api.cu calls; defined in sm80/launch.cuh and prepare_launch.cuh, instantiated in instantiations/.
#pragma once
#include "kernel_params.h"

namespace ds4sci {

template <typename T>
cudaError_t run_prepare(const KernelParams& p);
// d(pair_bias) in T, from its shares.
template <typename T>
cudaError_t run_finish_dpair(const KernelParams& p);
template <typename T, int kHeadDim>
cudaError_t run_evoformer_fwd(const KernelParams& p);
template <typename T, int kHeadDim>
cudaError_t run_evoformer_bwd_dq(const KernelParams& p);
template <typename T, int kHeadDim>
cudaError_t run_evoformer_bwd_dkv(const KernelParams& p);
template <typename T, int kHeadDim>
cudaError_t run_evoformer_bwd_dpair(const KernelParams& p);

}  // namespace ds4sci

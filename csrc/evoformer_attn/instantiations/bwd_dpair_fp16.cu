// SPDX-License-Identifier: Apache-2.0
// Written by generate_instantiations.py.
#include "sm80/launch.cuh"

namespace ds4sci {
template cudaError_t run_evoformer_bwd_dpair<fp16, 16>(const KernelParams&);
template cudaError_t run_evoformer_bwd_dpair<fp16, 32>(const KernelParams&);
template cudaError_t run_evoformer_bwd_dpair<fp16, 48>(const KernelParams&);
template cudaError_t run_evoformer_bwd_dpair<fp16, 64>(const KernelParams&);
template cudaError_t run_evoformer_bwd_dpair<fp16, 128>(const KernelParams&);
}  // namespace ds4sci

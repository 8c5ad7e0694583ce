// SPDX-License-Identifier: Apache-2.0
// Written by generate_instantiations.py.
#include "sm80/launch.cuh"

namespace ds4sci {
template cudaError_t run_evoformer_bwd_dkv<float, 16>(const KernelParams&);
template cudaError_t run_evoformer_bwd_dkv<float, 32>(const KernelParams&);
template cudaError_t run_evoformer_bwd_dkv<float, 48>(const KernelParams&);
template cudaError_t run_evoformer_bwd_dkv<float, 64>(const KernelParams&);
template cudaError_t run_evoformer_bwd_dkv<float, 128>(const KernelParams&);
}  // namespace ds4sci

// SPDX-License-Identifier: Apache-2.0
// Written by generate_instantiations.py.
#include "prepare_launch.cuh"

namespace ds4sci {
template cudaError_t run_prepare<fp16>(const KernelParams&);
template cudaError_t run_prepare<bf16>(const KernelParams&);
template cudaError_t run_prepare<float>(const KernelParams&);
template cudaError_t run_finish_dpair<fp16>(const KernelParams&);
template cudaError_t run_finish_dpair<bf16>(const KernelParams&);
template cudaError_t run_finish_dpair<float>(const KernelParams&);
}  // namespace ds4sci

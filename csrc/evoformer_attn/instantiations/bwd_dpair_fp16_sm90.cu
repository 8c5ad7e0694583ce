// SPDX-License-Identifier: Apache-2.0
// Written by generate_instantiations.py.
#include "sm90/launch.cuh"

namespace ds4sci {
template cudaError_t run_sm90_bwd_dpair<fp16, 16>(const Sm90Params&);
template cudaError_t run_sm90_bwd_dpair<fp16, 32>(const Sm90Params&);
template cudaError_t run_sm90_bwd_dpair<fp16, 64>(const Sm90Params&);
template cudaError_t run_sm90_bwd_marked_dpair<fp16, 16>(const Sm90Params&);
template cudaError_t run_sm90_bwd_marked_dpair<fp16, 32>(const Sm90Params&);
template cudaError_t run_sm90_bwd_marked_dpair<fp16, 64>(const Sm90Params&);
}  // namespace ds4sci

// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "finish_kernel.cuh"
#include "launch.h"
#include "prepare_kernel.cuh"

namespace ds4sci {

template <typename T>
cudaError_t run_prepare(const KernelParams& p) {
    const PrepareBlocks blocks = PrepareBlocks::of(p);
    return launch_kernel(&prepare_kernel<T>, blocks.pair + blocks.mask + blocks.vectors, kPrepareThreads, 0, p.stream,
                         p);
}

template <typename T>
cudaError_t run_finish_dpair(const KernelParams& p) {
    return launch_kernel(&finish_dpair_kernel<T>, ceil_div<int64_t>(dpair_elements(p), kFinishThreads), kFinishThreads,
                         0, p.stream, p);
}

}  // namespace ds4sci

// SPDX-License-Identifier: Apache-2.0
// After the main kernels: the shares of d(pair_bias), added up in order and rounded once.
#pragma once
#include "kernel_params.h"
#include "tile.h"

namespace ds4sci {

constexpr int kFinishThreads = 256;

template <typename T>
DS4SCI_DEVICE void store_rounded(T* out, float x) {
    if constexpr (sizeof(T) == 4) {
        *out = x;
    } else {
        out->bits = static_cast<uint16_t>(pack2<T>(x, 0.f));
    }
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_dpair_kernel(const __grid_constant__ KernelParams p) {
    const int64_t count = dpair_elements(p), i = static_cast<int64_t>(blockIdx.x) * kFinishThreads + threadIdx.x;
    if (i >= count) return;
    float sum = p.dpair_bias[i];
    for (int share = 1; share < p.dpair_splits; ++share) sum += p.dpair_bias[share * count + i];
    store_rounded(static_cast<T*>(p.dpair_out) + i, sum);
}

}  // namespace ds4sci

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

// Writes the sums of one thread of the Hopper kernels, in the accumulator layout: rows `query` and `query` + 8, keys
// `key`, + 1 and + 8 each. An only share is the result, unless the caller wants it in fp32.
template <typename T, int kTiles>
DS4SCI_DEVICE void store_dpair_share(const KernelParams& p, int split, int group, int head, int query, int key,
                                     const float (&sum)[kTiles][4]) {
    const int64_t row = ((static_cast<int64_t>(split) * p.num_groups + group) * p.heads + head) * p.q_len + query;
    const int64_t first_element = row * p.k_len + key;
    const int valid_rows = p.q_len - query, valid_keys = p.k_len - key;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (e / 2 * 8 >= valid_rows || j * 8 + e % 2 >= valid_keys) continue;
            const int64_t element = first_element + static_cast<int64_t>(e / 2 * 8) * p.k_len + j * 8 + e % 2;
            if (p.dpair_bias != nullptr) {
                p.dpair_bias[element] = sum[j][e];
            } else {
                store_rounded(static_cast<T*>(p.dpair_out) + element, sum[j][e]);
            }
        }
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

// SPDX-License-Identifier: Apache-2.0
//
// Stand-in for torch's header of the same name; see ../../torch/extension.h.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>

namespace at {
namespace cuda {

// Queried once, as torch does: the first device used.
inline cudaDeviceProp* getCurrentDeviceProperties() {
    static cudaDeviceProp properties = [] {
        cudaDeviceProp queried{};
        int device = 0;
        if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&queried, device) != cudaSuccess) {
            throw std::runtime_error("no CUDA device");
        }
        return queried;
    }();
    return &properties;
}

}  // namespace cuda
}  // namespace at

// SPDX-License-Identifier: Apache-2.0
//
// Narrows DeepSpeed's dispatch macros to what an Ampere or newer GPU runs in one dtype, so that the build takes a
// sixth of the time. DS4SCI_PEER_DTYPE: 0 fp16, 1 bf16. Everything else is DeepSpeed's, unchanged.
#pragma once

#include <cuda_runtime.h>
#include <torch/extension.h>

#include "gemm_kernel_utils.h"

// The build hides every other name, so that the stand-in never meets the real torch in one process.
#define PEER_EXPORT __attribute__((visibility("default")))

#undef DISPATCH_ARCHTAG
#define DISPATCH_ARCHTAG(CC, func)                                                                                    \
    {                                                                                                                 \
        if ((CC) < 80) {                                                                                              \
            throw std::runtime_error("this build needs sm_80");                                                       \
        }                                                                                                             \
        using ArchTag = cutlass::arch::Sm80;                                                                          \
        func;                                                                                                         \
    }

#if DS4SCI_PEER_DTYPE == 1
#define DS4SCI_PEER_CUTLASS_TYPE cutlass::bfloat16_t
#define DS4SCI_PEER_TORCH_TYPE at::BFloat16
#else
#define DS4SCI_PEER_CUTLASS_TYPE cutlass::half_t
#define DS4SCI_PEER_TORCH_TYPE at::Half
#endif

#undef DISPATCH_TYPES
#define DISPATCH_TYPES(tensor, func)                                                                                  \
    {                                                                                                                 \
        if (static_cast<int>(tensor.scalar_type()) != DS4SCI_PEER_DTYPE) {                                            \
            throw std::runtime_error("this build of DeepSpeed's op was made for another dtype");                      \
        }                                                                                                             \
        using scalar_t = DS4SCI_PEER_CUTLASS_TYPE;                                                                    \
        using torch_scalar_t = DS4SCI_PEER_TORCH_TYPE;                                                                \
        func;                                                                                                         \
    }

// Runs `call`; returns nullptr or what went wrong. The message lives until the next call on the same thread.
template <typename Call>
const char* peer_guarded(Call call) {
    static thread_local std::string message;
    try {
        call();
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    const cudaError_t status = cudaGetLastError();
    if (status != cudaSuccess) {
        message = cudaGetErrorString(status);
        return message.c_str();
    }
    return nullptr;
}

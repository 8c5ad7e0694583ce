// SPDX-License-Identifier: Apache-2.0
// Element types. Tags rather than CUDA's own classes: including cuda_bf16.h would double the compile time of a kernel.
#pragma once
#include <cstdint>

namespace ds4sci {

struct fp16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};

}  // namespace ds4sci

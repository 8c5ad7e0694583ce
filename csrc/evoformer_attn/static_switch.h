// SPDX-License-Identifier: Apache-2.0
// Run-time values to template arguments. Each switch ends in an error.
#pragma once
#include "element.h"
#include "params.h"

namespace ds4sci {

constexpr int32_t kInvalidHeadDim = -1;
constexpr int32_t kInvalidDtype = -2;
constexpr int32_t kInvalidArgument = -3;

// The smallest padded head dim that holds head_dim.
#define DS4SCI_HEAD_DIM_SWITCH(HEAD_DIM, ...)                                                                         \
    [&]() -> int32_t {                                                                                                \
        if ((HEAD_DIM) < 1) return kInvalidHeadDim;                                                                   \
        if ((HEAD_DIM) <= 16) {                                                                                       \
            constexpr int kHeadDim = 16;                                                                              \
            return __VA_ARGS__();                                                                                     \
        }                                                                                                             \
        if ((HEAD_DIM) <= 32) {                                                                                       \
            constexpr int kHeadDim = 32;                                                                              \
            return __VA_ARGS__();                                                                                     \
        }                                                                                                             \
        if ((HEAD_DIM) <= 48) {                                                                                       \
            constexpr int kHeadDim = 48;                                                                              \
            return __VA_ARGS__();                                                                                     \
        }                                                                                                             \
        if ((HEAD_DIM) <= 64) {                                                                                       \
            constexpr int kHeadDim = 64;                                                                              \
            return __VA_ARGS__();                                                                                     \
        }                                                                                                             \
        if ((HEAD_DIM) <= 128) {                                                                                      \
            constexpr int kHeadDim = 128;                                                                             \
            return __VA_ARGS__();                                                                                     \
        }                                                                                                             \
        return kInvalidHeadDim;                                                                                       \
    }()

#define DS4SCI_DTYPE_SWITCH(DTYPE, ...)                                                                               \
    [&]() -> int32_t {                                                                                                \
        switch (DTYPE) {                                                                                              \
            case kFloat16: {                                                                                          \
                using T = fp16;                                                                                       \
                return __VA_ARGS__();                                                                                 \
            }                                                                                                         \
            case kBFloat16: {                                                                                         \
                using T = bf16;                                                                                       \
                return __VA_ARGS__();                                                                                 \
            }                                                                                                         \
            case kFloat32: {                                                                                          \
                using T = float;                                                                                      \
                return __VA_ARGS__();                                                                                 \
            }                                                                                                         \
            default:                                                                                                  \
                return kInvalidDtype;                                                                                 \
        }                                                                                                             \
    }()

}  // namespace ds4sci

// SPDX-License-Identifier: Apache-2.0
// The one door to the machine. Kernels use only what this header gives them: on a GPU ptx.h; on a CPU the emulator of
// tests/emulator, which runs the same kernels thread by thread with checked memory accesses.
#pragma once
#include <cstdint>
#ifdef DS4SCI_EMULATE
#include "emulated_device.h"
#else
#include "ptx.h"
#endif

namespace ds4sci {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <typename Int>
DS4SCI_HOST_DEVICE constexpr Int ceil_div(Int a, Int b) {
    return (a + b - 1) / b;
}

template <typename Int>
DS4SCI_HOST_DEVICE constexpr Int round_up(Int a, Int b) {
    return ceil_div(a, b) * b;
}

}  // namespace ds4sci

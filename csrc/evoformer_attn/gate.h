// SPDX-License-Identifier: Apache-2.0
// The gate of the output: forward o = sigmoid(g) * softmax(...) v, applied to the fp32 accumulator; backward what the
// gate makes of dO, the gradient of o, before the main kernels run. The ungated output is never stored. With s =
// sigmoid(g) it is o / s, so that
//     dO' = s dO        the gradient that the main kernels read, rounded to T as they need it
//     delta = rowsum(dO' * o / s)
//     dg = dO o (1 - s)
// Where s is 0, so is all of it.
#pragma once
#include <cmath>

#include "device.h"
#include "tile.h"

namespace ds4sci {

struct Gate {
    static constexpr float kShut = -87.f;  // below it sigmoid(g) is no normal fp32 number, and taken for 0

    float open, shut, inverse;  // sigmoid(g); 1 - sigmoid(g), to all digits where that is small, too; 1 / sigmoid(g)

    static DS4SCI_DEVICE Gate of(float g) {
        const float decay = expf(g < kShut ? -kShut : -g), inverse = 1.f + decay, open = reciprocal_approx(inverse);
        return {g < kShut ? 0.f : open, decay * open, inverse};
    }
};

// Two neighbouring elements; the first one's index is even.
template <typename T>
DS4SCI_DEVICE float2 load_pair(const T* source) {
    if constexpr (sizeof(T) == 4) {
        return *reinterpret_cast<const float2*>(source);
    } else {
        return unpack2<T>(*reinterpret_cast<const uint32_t*>(source));
    }
}

// Multiply the first kHeadDim columns of one warp's accumulator of 16 rows by the sigmoid of `gate`, which is row 0 of
// the 16, of which `valid_rows` exist.
template <typename T, int kHeadDim, int kTiles>
DS4SCI_DEVICE void apply_gate(float (&acc)[kTiles][4], const T* gate, int64_t stride, int valid_rows, int head_dim,
                              int lane) {
    const int row = lane >> 2, column = (lane & 3) * 2;
#pragma unroll
    for (int high = 0; high < 2; ++high) {
        const T* source = gate + (row + 8 * high) * stride + column;
#pragma unroll
        for (int j = 0; j < kHeadDim / 8; ++j) {
            if (row + 8 * high < valid_rows && j * 8 + column < head_dim) {
                const float2 g = load_pair(source + j * 8);
                acc[j][2 * high] *= Gate::of(g.x).open;
                acc[j][2 * high + 1] *= Gate::of(g.y).open;
            }
        }
    }
}

// Backward, 8 bytes of each: gate, o, the gradient of o. No more at a time, or the kernel that has this as one of its
// branches needs more registers in all of them.
template <typename T>
struct GateGradients {
    uint2 d_o, d_gate;
    float delta;

    static DS4SCI_DEVICE GateGradients of(const uint2& gate, const uint2& o, const uint2& d_out) {
        const uint32_t g[2] = {gate.x, gate.y}, out[2] = {o.x, o.y}, d[2] = {d_out.x, d_out.y};
        uint32_t d_o[2], d_gate[2];
        float delta = 0.f;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (sizeof(T) == 4) {
                const Gate s = Gate::of(bits_to_float(g[i]));
                const float x = bits_to_float(out[i]), dx = bits_to_float(d[i]);
                d_o[i] = float_to_bits(s.open * dx);
                d_gate[i] = float_to_bits(dx * x * s.shut);
                delta = fmaf(bits_to_float(d_o[i]), x * s.inverse, delta);
            } else {
                const float2 logits = unpack2<T>(g[i]), x = unpack2<T>(out[i]), dx = unpack2<T>(d[i]);
                const Gate low = Gate::of(logits.x), high = Gate::of(logits.y);
                d_o[i] = pack2<T>(low.open * dx.x, high.open * dx.y);
                d_gate[i] = pack2<T>(dx.x * x.x * low.shut, dx.y * x.y * high.shut);
                const float2 rounded = unpack2<T>(d_o[i]);
                delta = fmaf(rounded.x, x.x * low.inverse, fmaf(rounded.y, x.y * high.inverse, delta));
            }
        }
        return {make_uint2(d_o[0], d_o[1]), make_uint2(d_gate[0], d_gate[1]), delta};
    }
};

}  // namespace ds4sci

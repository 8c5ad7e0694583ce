// SPDX-License-Identifier: Apache-2.0
// Online softmax of 16 query rows of one warp (Milakov and Gimelshein 2018) with lazy rescaling: the reference only
// moves when a logit exceeds it by more than log(2^8). Any reference gives the same quotient, so this stays exact.
#pragma once
#include <cmath>

#include "device.h"

namespace ds4sci {

struct OnlineSoftmax {
    static constexpr float kRescaleThreshold = 5.5f;  // natural units: exp of what is left stays below 256
    // Below every logit, yet finite, so that a row without keys so far has exp(-inf - reference) = 0.
    static constexpr float kLowest = -1e30f;
    // From here on x * log2(e) - reference * log2(e) would round by whole units.
    static constexpr float kLargeReference = 1e5f;

    float reference[2];  // rows quad, quad + 8
    float sum[2];        // this lane's share of the row sums

    DS4SCI_DEVICE void reset() {
        reference[0] = reference[1] = kLowest;
        sum[0] = sum[1] = 0.f;
    }

    // Turn logits into unnormalised probabilities; rescale `o` when the reference moves.
    template <int kTiles, int kOutputTiles>
    DS4SCI_DEVICE void update(float (&x)[kTiles][4], float (&o)[kOutputTiles][4]) {
        float max_low = reference[0], max_high = reference[1];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            max_low = fmaxf(max_low, fmaxf(x[j][0], x[j][1]));
            max_high = fmaxf(max_high, fmaxf(x[j][2], x[j][3]));
        }
        max_low = fmaxf(max_low, shfl_xor(max_low, 1));
        max_high = fmaxf(max_high, shfl_xor(max_high, 1));
        max_low = fmaxf(max_low, shfl_xor(max_low, 2));
        max_high = fmaxf(max_high, shfl_xor(max_high, 2));
        if (warp_any(max_low > reference[0] + kRescaleThreshold || max_high > reference[1] + kRescaleThreshold)) {
            const float factor_low = factor(reference[0], max_low), factor_high = factor(reference[1], max_high);
            reference[0] = max_low;
            reference[1] = max_high;
            sum[0] *= factor_low;
            sum[1] *= factor_high;
#pragma unroll
            for (int j = 0; j < kOutputTiles; ++j) {
                o[j][0] *= factor_low;
                o[j][1] *= factor_low;
                o[j][2] *= factor_high;
                o[j][3] *= factor_high;
            }
        }
        float low = multiply_rounded(reference[0], kLog2E), high = multiply_rounded(reference[1], kLog2E);
        if (warp_any(is_large(reference[0]) || is_large(reference[1]))) {
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                x[j][0] -= reference[0];
                x[j][1] -= reference[0];
                x[j][2] -= reference[1];
                x[j][3] -= reference[1];
            }
            low = high = 0.f;
        }
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            x[j][0] = exp2_approx(fmaf(x[j][0], kLog2E, -low));
            x[j][1] = exp2_approx(fmaf(x[j][1], kLog2E, -low));
            x[j][2] = exp2_approx(fmaf(x[j][2], kLog2E, -high));
            x[j][3] = exp2_approx(fmaf(x[j][3], kLog2E, -high));
            sum[0] += x[j][0] + x[j][1];
            sum[1] += x[j][2] + x[j][3];
        }
    }

    DS4SCI_DEVICE void finish() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            sum[i] += shfl_xor(sum[i], 1);
            sum[i] += shfl_xor(sum[i], 2);
        }
    }
    // 1 / row sum; 0 for a row without keys, whose output is 0. NaN stays NaN.
    DS4SCI_DEVICE float normaliser(int i) const { return sum[i] == 0.f ? 0.f : 1.f / sum[i]; }
    // Natural log of the row sum; -inf for a row without keys.
    template <typename Lse>
    DS4SCI_DEVICE Lse lse(int i) const {
        if (sum[i] == 0.f) return -INFINITY;
        const float scaled = multiply_rounded(reference[i], kLog2E);
        if constexpr (sizeof(Lse) == 8) {
            // As the backward pass forms logits: fmaf rounds reference * kLog2E nowhere.
            const double units = is_large(reference[i]) ? static_cast<double>(reference[i]) * kLog2E : scaled;
            return (units + log2(static_cast<double>(sum[i]))) * 0.6931471805599453094;
        }
        if (is_large(reference[i])) return reference[i] + log2f(sum[i]) * kLn2;
        return (scaled + log2f(sum[i])) * kLn2;
    }

  private:
    static DS4SCI_DEVICE bool is_large(float reference) { return fabsf(reference) > kLargeReference; }
    // What one unit of probability under the old reference is under the new one. Built from the same rounded products
    // as the probabilities themselves, so that fp32 sums of both kinds of tile fit together.
    static DS4SCI_DEVICE float factor(float before, float after) {
        if (is_large(before) || is_large(after)) return exp2_approx((before - after) * kLog2E);
        return exp2_approx(multiply_rounded(before, kLog2E) - multiply_rounded(after, kLog2E));
    }
};

}  // namespace ds4sci

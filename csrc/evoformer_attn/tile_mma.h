// SPDX-License-Identifier: Apache-2.0
// Products of shared-memory tiles, one warp and 16 rows at a time. Tensor cores for 16-bit elements; plain fp32 FMA
// for fp32, with the same distribution of results over lanes, so that kernels are written once.
//
// Accumulator layout (that of mma.m16n8): lane = 4 * quad + pair holds of each 16 x 8 tile the elements
// [0], [1]: row quad, columns 2 * pair, 2 * pair + 1;   [2], [3]: row quad + 8, same columns.
#pragma once
#include "tile.h"

namespace ds4sci {

template <typename T, int kHeadDim>
struct TileMma {
    static constexpr int kPitch = TilePitch<T, kHeadDim>::kBytes;

    // acc[16, 8 * kTiles] = A[16, D] B[8 * kTiles, D]^T; a, b: addresses of the first rows.
    template <int kTiles>
    static DS4SCI_DEVICE void product_abt(float (&acc)[kTiles][4], uint32_t a, uint32_t b, int lane) {
        static_assert(kTiles % 2 == 0, "one ldmatrix.x4 feeds two tiles");
        const uint32_t a_lane = a + (lane & 15) * kPitch + (lane >> 4) * kChunkBytes;
        const uint32_t b_lane = b + ((lane >> 4) * 8 + (lane & 7)) * kPitch + ((lane >> 3) & 1) * kChunkBytes;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
#pragma unroll
        for (int kk = 0; kk < kHeadDim / 16; ++kk) {
            uint32_t a_fragment[4];
            ldmatrix_x4(a_fragment, a_lane + kk * 32);
#pragma unroll
            for (int j = 0; j < kTiles; j += 2) {
                uint32_t b_fragment[4];
                ldmatrix_x4(b_fragment, b_lane + j * 8 * kPitch + kk * 32);
                mma_m16n8k16<T>(acc[j], a_fragment, b_fragment[0], b_fragment[1]);
                mma_m16n8k16<T>(acc[j + 1], a_fragment, b_fragment[2], b_fragment[3]);
            }
        }
    }

    // acc[16, D] += P[16, 8 * kTiles] B[8 * kTiles, D]; P is rounded to T.
    template <int kTiles>
    static DS4SCI_DEVICE void product_pb(float (&acc)[kHeadDim / 8][4], const float (&p)[kTiles][4], uint32_t b,
                                         int lane) {
        static_assert(kTiles % 2 == 0, "one k step takes two tiles of P");
        const uint32_t b_lane = b + (((lane >> 3) & 1) * 8 + (lane & 7)) * kPitch + (lane >> 4) * kChunkBytes;
#pragma unroll
        for (int kk = 0; kk < kTiles / 2; ++kk) {
            const uint32_t a_fragment[4] = {pack2<T>(p[2 * kk][0], p[2 * kk][1]), pack2<T>(p[2 * kk][2], p[2 * kk][3]),
                                            pack2<T>(p[2 * kk + 1][0], p[2 * kk + 1][1]),
                                            pack2<T>(p[2 * kk + 1][2], p[2 * kk + 1][3])};
#pragma unroll
            for (int j = 0; j < kHeadDim / 8; j += 2) {
                uint32_t b_fragment[4];
                ldmatrix_x4_trans(b_fragment, b_lane + kk * 16 * kPitch + j * kChunkBytes);
                mma_m16n8k16<T>(acc[j], a_fragment, b_fragment[0], b_fragment[1]);
                mma_m16n8k16<T>(acc[j + 1], a_fragment, b_fragment[2], b_fragment[3]);
            }
        }
    }
};

DS4SCI_DEVICE float dot4(float4 a, float4 b, float acc) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, acc))));
}

template <int kHeadDim>
struct TileMma<float, kHeadDim> {
    static constexpr int kPitch = TilePitch<float, kHeadDim>::kBytes;

    template <int kTiles>
    static DS4SCI_DEVICE void product_abt(float (&acc)[kTiles][4], uint32_t a, uint32_t b, int lane) {
        const uint32_t a_lane = a + (lane >> 2) * kPitch, b_lane = b + (lane & 3) * 2 * kPitch;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
#pragma unroll 1  // unrolled, it spills at D = 128
        for (int d = 0; d < kHeadDim / 4; ++d) {
            const float4 a_low = lds_f32x4(a_lane + d * kChunkBytes);
            const float4 a_high = lds_f32x4(a_lane + 8 * kPitch + d * kChunkBytes);
#pragma unroll
            for (int j = 0; j < kTiles; ++j) {
                const float4 b_even = lds_f32x4(b_lane + j * 8 * kPitch + d * kChunkBytes);
                const float4 b_odd = lds_f32x4(b_lane + (j * 8 + 1) * kPitch + d * kChunkBytes);
                acc[j][0] = dot4(a_low, b_even, acc[j][0]);
                acc[j][1] = dot4(a_low, b_odd, acc[j][1]);
                acc[j][2] = dot4(a_high, b_even, acc[j][2]);
                acc[j][3] = dot4(a_high, b_odd, acc[j][3]);
            }
        }
    }

    template <int kTiles>
    static DS4SCI_DEVICE void product_pb(float (&acc)[kHeadDim / 8][4], const float (&p)[kTiles][4], uint32_t b,
                                         int lane) {
        const uint32_t b_lane = b + (lane & 3) * 2 * sizeof(float);
        // A few terms by themselves, then onto the long sum: one running sum would lose digits with every key.
        constexpr int kTerms = 8;
#pragma unroll
        for (int first = 0; first < kTiles * 8; first += kTerms) {
            float p_low[kTerms], p_high[kTerms];
#pragma unroll
            for (int i = 0; i < kTerms; ++i) {
                const int key = (first + i) % 8, owner = (lane & ~3) | (key >> 1);
                p_low[i] = shfl(p[first / 8][key & 1], owner);
                p_high[i] = shfl(p[first / 8][2 + (key & 1)], owner);
            }
#pragma unroll
            for (int j = 0; j < kHeadDim / 8; ++j) {
                float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int i = 0; i < kTerms; ++i) {
                    const float2 value = lds_f32x2(b_lane + (first + i) * kPitch + j * 8 * sizeof(float));
                    sum[0] = fmaf(p_low[i], value.x, sum[0]);
                    sum[1] = fmaf(p_low[i], value.y, sum[1]);
                    sum[2] = fmaf(p_high[i], value.x, sum[2]);
                    sum[3] = fmaf(p_high[i], value.y, sum[3]);
                }
#pragma unroll
                for (int e = 0; e < 4; ++e) acc[j][e] += sum[e];
            }
        }
    }
};

}  // namespace ds4sci

// SPDX-License-Identifier: Apache-2.0
// Shared-memory tiles: rows of kRowBytes plus 16 bytes of padding. The padded pitch is an odd number of 16-byte
// chunks, so eight consecutive rows at the same column fall into eight different bank groups: ldmatrix, row-wise and
// column-wise reads are free of conflicts without any swizzle arithmetic.
#pragma once
#include "device.h"

namespace ds4sci {

constexpr int kChunkBytes = 16;

template <typename T, int kCols>
struct TilePitch {
    static_assert(kCols * sizeof(T) % 32 == 0,
                  "the pitch is odd in chunks only if a row holds an even number of them");
    static constexpr int kRowBytes = kCols * sizeof(T);
    static constexpr int kBytes = kRowBytes + kChunkBytes;
};

// Copies tiles of kTileRows x kHeadDim elements into shared memory. Rows past the end repeat the last row: what they
// would add is dropped (keys by the bias, queries by their statistics), and an address that depends on the tile keeps
// the compiler from holding the address of every copy in registers, which spills.
template <typename T, int kHeadDim, int kTileRows, int kNumThreads>
struct TileCopy {
    static constexpr int kPitch = TilePitch<T, kHeadDim>::kBytes;
    static constexpr int kChunks = TilePitch<T, kHeadDim>::kRowBytes / kChunkBytes;
    static constexpr int kChunkElements = kChunkBytes / sizeof(T);
    // Threads that share a row, a power of two; those past the last chunk stay idle.
    static constexpr int kLanes = kChunks <= 2 ? 2 : kChunks <= 4 ? 4 : kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
    static constexpr int kRowStep = kNumThreads / kLanes;

    // `source` is row 0 of `length` rows, `stride` elements apart; the tile starts at row `first`. Chunks past the
    // head dim are left alone (see clear_padding).
    static DS4SCI_DEVICE void load(uint32_t tile, const T* source, int32_t stride, int first, int length, int head_dim,
                                   int thread) {
        const int row = thread / kLanes, chunk = thread % kLanes;
        if (chunk * kChunkElements >= head_dim) return;
        tile += row * kPitch + chunk * kChunkBytes;
        source += chunk * kChunkElements;
#pragma unroll 2
        for (int i = 0; i < kTileRows; i += kRowStep) {
            if (kTileRows % kRowStep != 0 && row + i >= kTileRows) break;
            const int wanted = first + row + i, last = length - 1;
            cp_async_16(tile + i * kPitch, source + static_cast<int64_t>(wanted < last ? wanted : last) * stride);
        }
    }

    // Zero the chunks past the head dim. No copy writes them, so once per buffer is enough.
    static DS4SCI_DEVICE void clear_padding(uint32_t tile, int head_dim, int thread) {
        const int first = ceil_div(head_dim, kChunkElements);
        for (int row = thread / kLanes; row < kTileRows; row += kRowStep) {
            const int chunk = thread % kLanes;
            if (chunk >= first && chunk < kChunks) sts_zero_16(tile + row * kPitch + chunk * kChunkBytes);
        }
    }
};

// Copy kFloats consecutive fp32 values (a multiple of four) into shared memory.
template <int kFloats, int kNumThreads>
DS4SCI_DEVICE void load_vector(uint32_t dst, const float* source, int thread) {
    static_assert(kFloats % 4 == 0, "whole 16-byte chunks");
#pragma unroll
    for (int first = 0; first < kFloats / 4; first += kNumThreads) {
        const int i = first + thread;
        if (i < kFloats / 4) cp_async_16(dst + i * kChunkBytes, source + i * 4);
    }
}

template <typename T>
DS4SCI_DEVICE void store_pair(uint32_t address, float low, float high);
template <>
DS4SCI_DEVICE void store_pair<bf16>(uint32_t address, float low, float high) {
    sts_u32(address, pack2<bf16>(low, high));
}
template <>
DS4SCI_DEVICE void store_pair<fp16>(uint32_t address, float low, float high) {
    sts_u32(address, pack2<fp16>(low, high));
}
template <>
DS4SCI_DEVICE void store_pair<float>(uint32_t address, float low, float high) {
    sts_f32x2(address, low, high);
}

// Write one warp's 16 x kHeadDim accumulator, times a factor per row, to global memory in 16-byte pieces, by way of 16
// rows of shared memory that belong to this warp alone.
template <typename T, int kHeadDim>
DS4SCI_DEVICE void store_accumulator(T* dst, int64_t stride, int valid_rows, int head_dim, uint32_t scratch,
                                     const float (&acc)[kHeadDim / 8][4], float factor_low, float factor_high,
                                     int lane) {
    using Pitch = TilePitch<T, kHeadDim>;
    constexpr int kChunks = Pitch::kRowBytes / kChunkBytes;
    constexpr int kChunkElements = kChunkBytes / sizeof(T);
    const int quad = lane >> 2, pair = lane & 3;
    warp_sync();
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j) {
        const uint32_t column = (j * 8 + pair * 2) * sizeof(T);
        store_pair<T>(scratch + quad * Pitch::kBytes + column, acc[j][0] * factor_low, acc[j][1] * factor_low);
        store_pair<T>(scratch + (quad + 8) * Pitch::kBytes + column, acc[j][2] * factor_high, acc[j][3] * factor_high);
    }
    warp_sync();
#pragma unroll 4
    for (int i = lane; i < 16 * kChunks; i += 32) {
        const int row = i / kChunks, chunk = i % kChunks;
        const uint4 value = lds_u32x4(scratch + row * Pitch::kBytes + chunk * kChunkBytes);
        if (row < valid_rows && chunk * kChunkElements < head_dim) {
            *reinterpret_cast<uint4*>(dst + row * stride + chunk * kChunkElements) = value;
        }
    }
}

}  // namespace ds4sci

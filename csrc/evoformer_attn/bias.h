// SPDX-License-Identifier: Apache-2.0
// The pair bias of one tile: global -> shared -> the accumulator layout of tile_mma.h, as (bias - row maximum) in
// fp32. The bias is never rounded: a 16-bit bias is widened before the subtraction, an fp32 bias stays fp32.
//
// A dropped key is -inf; arithmetic carries it through: -inf + finite = -inf and exp2(-inf) = 0.
#pragma once
#include <cmath>

#include "kernel_params.h"
#include "tile.h"

namespace ds4sci {

DS4SCI_HOST_DEVICE constexpr int bias_pitch(int columns, int element_bytes) {
    return columns * element_bytes + kChunkBytes;
}

// Copies tiles of kTileRows queries x kCols keys. Past the last query or key it repeats the last row or 16 bytes,
// which nobody uses; rows are padded to whole 16 bytes (params.h).
template <int kTileRows, int kCols, int kNumThreads>
struct BiasCopy {
    template <int kElementBytes>
    static DS4SCI_DEVICE void load_elements(uint32_t tile, const KernelParams& p, int64_t offset, int q, int key,
                                            int thread) {
        constexpr int kChunkElements = kChunkBytes / kElementBytes, kPitch = bias_pitch(kCols, kElementBytes);
        constexpr int kLanes = kCols / kChunkElements;  // threads that share a row
        constexpr int kRowStep = kNumThreads / kLanes;
        const int row = thread / kLanes, chunk = thread % kLanes;
        const int wanted_key = key + chunk * kChunkElements,
                  last_key = (p.k_len - 1) / kChunkElements * kChunkElements;
        const unsigned char* source = static_cast<const unsigned char*>(p.pair_bias) +
                                      (offset + (wanted_key < last_key ? wanted_key : last_key)) * kElementBytes;
        tile += row * kPitch + chunk * kChunkBytes;
#pragma unroll
        for (int i = 0; i < kTileRows; i += kRowStep) {
            if (kTileRows % kRowStep != 0 && row + i >= kTileRows) break;
            const int wanted = q + row + i, last = p.q_len - 1;
            cp_async_16(tile + i * kPitch, source + (wanted < last ? wanted : last) * p.pair_stride_q * kElementBytes);
        }
    }
    static DS4SCI_DEVICE void load(uint32_t tile, const KernelParams& p, int64_t offset, int q, int key, int thread) {
        if (p.pair_is_fp32()) {
            load_elements<4>(tile, p, offset, q, key, thread);
        } else {
            load_elements<2>(tile, p, offset, q, key, thread);
        }
    }
};

// Rows are queries. `tile` is the address of the warp's first row and first column.
template <typename T, int kTiles>
DS4SCI_DEVICE void read_bias(float (&bias)[kTiles][4], uint32_t tile, int pitch, bool is_fp32, float ref_low,
                             float ref_high, int lane) {
    if (is_fp32) {
        const uint32_t address = tile + (lane >> 2) * pitch + (lane & 3) * 8;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            const float2 low = lds_f32x2(address + j * 32), high = lds_f32x2(address + 8 * pitch + j * 32);
            bias[j][0] = low.x - ref_low;
            bias[j][1] = low.y - ref_low;
            bias[j][2] = high.x - ref_high;
            bias[j][3] = high.y - ref_high;
        }
        return;
    }
    if constexpr (sizeof(T) == 2) {
        const uint32_t address = tile + (lane & 15) * pitch + (lane >> 4) * kChunkBytes;
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
            uint32_t fragment[4];
            ldmatrix_x4(fragment, address + j * kChunkBytes);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 low = unpack2<T>(fragment[2 * half]), high = unpack2<T>(fragment[2 * half + 1]);
                bias[j + half][0] = low.x - ref_low;
                bias[j + half][1] = low.y - ref_low;
                bias[j + half][2] = high.x - ref_high;
                bias[j + half][3] = high.y - ref_high;
            }
        }
    }
}

// Rows are keys, columns queries. `tile` is the address of the first query (row) and the warp's first key (column);
// `refs` the address of the row references of those queries.
template <typename T, int kTiles>
DS4SCI_DEVICE void read_bias_transposed(float (&bias)[kTiles][4], uint32_t tile, int pitch, bool is_fp32,
                                        uint32_t refs, int lane) {
    const int quad = lane >> 2, pair = lane & 3;
    if (is_fp32) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            const uint32_t address = tile + (j * 8 + pair * 2) * pitch + quad * 4;
            bias[j][0] = lds_f32(address);
            bias[j][1] = lds_f32(address + pitch);
            bias[j][2] = lds_f32(address + 32);
            bias[j][3] = lds_f32(address + pitch + 32);
        }
    } else if constexpr (sizeof(T) == 2) {
        const uint32_t address = tile + ((lane >> 4) * 8 + (lane & 7)) * pitch + ((lane >> 3) & 1) * kChunkBytes;
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
            uint32_t fragment[4];
            ldmatrix_x4_trans(fragment, address + j * 8 * pitch);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 low = unpack2<T>(fragment[2 * half]), high = unpack2<T>(fragment[2 * half + 1]);
                bias[j + half][0] = low.x;
                bias[j + half][1] = low.y;
                bias[j + half][2] = high.x;
                bias[j + half][3] = high.y;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        const float2 ref = lds_f32x2(refs + (j * 8 + pair * 2) * 4);
        bias[j][0] = bias[j][0] - ref.x;
        bias[j][1] = bias[j][1] - ref.y;
        bias[j][2] = bias[j][2] - ref.x;
        bias[j][3] = bias[j][3] - ref.y;
    }
}

template <int kTiles>
DS4SCI_DEVICE void zero_bias(float (&bias)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) bias[j][0] = bias[j][1] = bias[j][2] = bias[j][3] = 0.f;
}

// Drop the columns (keys) from `valid_columns` on.
template <int kTiles>
DS4SCI_DEVICE void drop_columns(float (&bias)[kTiles][4], int valid_columns, int lane) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (j * 8 + (lane & 3) * 2 + (e & 1) >= valid_columns) bias[j][e] = -INFINITY;
        }
    }
}

// x += mask of the key, for rows that are queries. `mask` is the address of the first column's value.
template <int kTiles>
DS4SCI_DEVICE void add_mask(float (&x)[kTiles][4], uint32_t mask, int lane) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        const float2 value = lds_f32x2(mask + (j * 8 + (lane & 3) * 2) * 4);
        x[j][0] += value.x;
        x[j][1] += value.y;
        x[j][2] += value.x;
        x[j][3] += value.y;
    }
}

}  // namespace ds4sci

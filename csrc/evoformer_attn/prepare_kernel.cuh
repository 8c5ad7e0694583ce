// SPDX-License-Identifier: Apache-2.0
// One launch before the main kernels. Its blocks do one of three small things, by block number:
//   pair rows   pair_max  = row max of the pair bias
//   mask rows   mask      = mask - row max, fp32, padded with -inf
//   vectors     row_stats = {lse * log2(e), delta = rowsum(dO * O)}, padded with {+inf, 0}      (backward)
//               with a gate also the dO that the main kernels read, and the gate's gradient (gate.h)
// Softmax is invariant to a constant per row, so subtracting the row maxima is exact. It keeps rows whose every key
// carries a large negative bias (-1e9) exact as well: in fp32, -1e9 + logit would lose the logit.
#pragma once
#include <cmath>

#include "gate.h"
#include "kernel_params.h"
#include "tile.h"

namespace ds4sci {

constexpr int kPrepareThreads = 256;
constexpr int kPrepareWarps = kPrepareThreads / 32;

// The [D] vectors of delta, counted over [B * N, q_len_padded, H] from the start of a row on: neighbouring lanes read
// neighbouring heads, which are neighbours in memory. A block has vectors of one row only.
struct VectorBlocks {
    static constexpr int kAtOnce = 2;    // vectors of one lane; without a gate their reads are on their way together
    static constexpr int kMaxLanes = 4;  // that share a vector
    int lanes;                           // 16 bytes each at a time; with a gate 8
    uint32_t vectors_per_row, per_block, per_row;  // vectors of a row; of a block; blocks of a row

    DS4SCI_HOST_DEVICE static VectorBlocks of(const KernelParams& p) {
        const int chunks = ceil_div(p.head_dim * (p.dtype == kFloat32 ? 4 : 2), kChunkBytes);
        VectorBlocks blocks;
        blocks.lanes = p.gate != nullptr || chunks > 2 ? kMaxLanes : chunks;
        blocks.vectors_per_row = static_cast<uint32_t>(p.q_len_padded) * p.heads;
        blocks.per_block = kPrepareThreads / blocks.lanes * kAtOnce;
        blocks.per_row = ceil_div(blocks.vectors_per_row, blocks.per_block);
        return blocks;
    }
    DS4SCI_HOST_DEVICE int64_t count(const KernelParams& p) const {
        return static_cast<int64_t>(p.batch) * p.rows * per_row;
    }
};

struct PrepareBlocks {
    int64_t pair, mask, vectors;

    DS4SCI_HOST_DEVICE static PrepareBlocks of(const KernelParams& p) {
        PrepareBlocks blocks{0, 0, 0};
        if (p.pair_max != nullptr) {
            blocks.pair =
                ceil_div<int64_t>(static_cast<int64_t>(p.pair_batch) * p.pair_heads * p.q_len_padded, kPrepareWarps);
        }
        if (p.mask != nullptr) {
            blocks.mask = ceil_div<int64_t>(static_cast<int64_t>(p.mask_batch) * p.mask_rows, kPrepareWarps);
        }
        if (p.row_stats != nullptr) blocks.vectors = VectorBlocks::of(p).count(p);
        return blocks;
    }
};

DS4SCI_DEVICE float warp_max(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) x = fmaxf(x, shfl_xor(x, mask));
    return x;
}

// The largest of the elements in a 16-byte chunk, of which `valid` count.
template <typename T>
DS4SCI_DEVICE float chunk_max(const uint4& chunk, int valid) {
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            if (i < valid) maximum = fmaxf(maximum, bits_to_float(words[i]));
        } else {
            const float2 pair = unpack2<T>(words[i]);
            if (2 * i < valid) maximum = fmaxf(maximum, pair.x);
            if (2 * i + 1 < valid) maximum = fmaxf(maximum, pair.y);
        }
    }
    return maximum;
}

template <typename T>
DS4SCI_DEVICE float pair_row_max(const T* row, int k_len, int lane) {
    constexpr int kElements = kChunkBytes / sizeof(T);
    float maximum = -INFINITY;
#pragma unroll 4
    for (int key = lane * kElements; key < k_len; key += 32 * kElements) {
        maximum = fmaxf(maximum, chunk_max<T>(*reinterpret_cast<const uint4*>(row + key), k_len - key));
    }
    return warp_max(maximum);
}

DS4SCI_DEVICE int64_t num_pair_rows(const KernelParams& p) {
    return static_cast<int64_t>(p.pair_batch) * p.pair_heads * p.q_len_padded;
}

// The largest element of one of num_pair_rows() rows; 0 if all are -inf, and past q_len.
template <typename T>
DS4SCI_DEVICE float pair_reference(const KernelParams& p, int64_t row, int lane) {
    const int q = static_cast<int>(row % p.q_len_padded);
    const int64_t head_row = row / p.q_len_padded;
    const int64_t offset =
        head_row / p.pair_heads * p.pair_stride_b + head_row % p.pair_heads * p.pair_stride_h + q * p.pair_stride_q;
    const int k_len = q < p.q_len ? p.k_len : 0;
    const float maximum = p.pair_is_fp32() ? pair_row_max(static_cast<const float*>(p.pair_bias) + offset, k_len, lane)
                                           : pair_row_max(static_cast<const T*>(p.pair_bias) + offset, k_len, lane);
    return maximum == -INFINITY ? 0.f : maximum;
}

template <typename T>
DS4SCI_DEVICE void prepare_pair_row(const KernelParams& p, int64_t row, int lane) {
    if (row >= num_pair_rows(p)) return;
    const float reference = pair_reference<T>(p, row, lane);
    if (lane == 0) p.pair_max[row] = reference;
}

struct KeepMask {
    uint8_t keep;
};
DS4SCI_DEVICE float to_float(KeepMask mask) { return mask.keep != 0 ? 0.f : -INFINITY; }

// Calls write(key, mask - row max) for every key up to k_len_padded, -inf for those beyond k_len. Returns the row max,
// -inf if no key is left.
template <typename Source, typename Write>
DS4SCI_DEVICE float visit_mask_row(const Source* source, int64_t stride, const KernelParams& p, int lane,
                                   const Write& write) {
    float maximum = -INFINITY;
#pragma unroll 4
    for (int key = lane; key < p.k_len; key += 32) maximum = fmaxf(maximum, to_float(source[key * stride]));
    maximum = warp_max(maximum);
    const float reference = maximum == -INFINITY ? 0.f : maximum;
#pragma unroll 4
    for (int key = lane; key < p.k_len_padded; key += 32) {
        write(key, key < p.k_len ? to_float(source[key * stride]) - reference : -INFINITY);
    }
    return maximum;
}

template <typename T, typename Write>
DS4SCI_DEVICE float visit_mask_row(const KernelParams& p, int64_t row, int lane, const Write& write) {
    const int64_t offset = row / p.mask_rows * p.mask_stride_b + row % p.mask_rows * p.mask_stride_n;
    if (p.mask_dtype == kBool)
        return visit_mask_row(static_cast<const KeepMask*>(p.mask_bias) + offset, p.mask_stride_k, p, lane, write);
    if (p.mask_dtype == kFloat32)
        return visit_mask_row(static_cast<const float*>(p.mask_bias) + offset, p.mask_stride_k, p, lane, write);
    return visit_mask_row(static_cast<const T*>(p.mask_bias) + offset, p.mask_stride_k, p, lane, write);
}

template <typename T>
DS4SCI_DEVICE void prepare_mask_row(const KernelParams& p, int64_t row, int lane) {
    if (row >= static_cast<int64_t>(p.mask_batch) * p.mask_rows) return;
    float* prepared = p.mask + row * p.k_len_padded;
    visit_mask_row<T>(p, row, lane, [&](int key, float value) { prepared[key] = value; });
}

template <typename T>
DS4SCI_DEVICE float dot_chunk(const uint4& a, const uint4& b) {
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 u = unpack2<T>(x[i]), w = unpack2<T>(y[i]);
        sum = fmaf(u.x, w.x, fmaf(u.y, w.y, sum));
    }
    return sum;
}
template <>
DS4SCI_DEVICE float dot_chunk<float>(const uint4& a, const uint4& b) {
    return bits_to_float(a.x) * bits_to_float(b.x) + bits_to_float(a.y) * bits_to_float(b.y) +
           bits_to_float(a.z) * bits_to_float(b.z) + bits_to_float(a.w) * bits_to_float(b.w);
}

// One row (b, n), query and head of a strided tensor.
template <typename T>
DS4SCI_DEVICE const T* vector_of(const void* base, const RowStrides& stride, const KernelParams& p, int row, int q,
                                 int head) {
    return static_cast<const T*>(base) + row / p.rows * stride.b + row % p.rows * stride.n + q * stride.l +
           head * stride.h;
}

// This lane's share of delta of one vector with a gate. Writes what the gate makes of dO, and the gate's gradient
// where it is wanted. `first`: index of the vector in contiguous tensors.
template <typename T>
DS4SCI_DEVICE float gated_delta(const KernelParams& p, int64_t first, const T* d_o, const T* gate, int part) {
    constexpr int kPieceElements = 8 / sizeof(T);
    const T* o = static_cast<const T*>(p.o) + first;
    T *gated_d_o = static_cast<T*>(p.gated_d_o) + first, *d_gate = static_cast<T*>(p.d_gate) + first;
    float delta = 0.f;
#pragma unroll 1
    for (int d = part * kPieceElements; d < p.head_dim; d += VectorBlocks::kMaxLanes * kPieceElements) {
        const auto gated =
            GateGradients<T>::of(*reinterpret_cast<const uint2*>(gate + d), *reinterpret_cast<const uint2*>(o + d),
                                 *reinterpret_cast<const uint2*>(d_o + d));
        delta += gated.delta;
        *reinterpret_cast<uint2*>(gated_d_o + d) = gated.d_o;
        if (p.d_gate != nullptr) *reinterpret_cast<uint2*>(d_gate + d) = gated.d_gate;
    }
    return delta;
}

// Calls write(index in [B, N, H, q_len_padded], lse, delta) for every vector of one block, in one of the lanes that
// share it. lse is the natural logarithm, +inf where P must be 0; delta is 0 where there is no query.
template <typename T, int kLanes, typename Write>
DS4SCI_DEVICE void visit_row_stats(const KernelParams& p, const VectorBlocks& blocks, uint32_t block, int thread,
                                   const Write& write) {
    using Lse = typename LseType<T>::type;
    constexpr int kAtOnce = VectorBlocks::kAtOnce, kChunkElements = kChunkBytes / sizeof(T);
    const int row = static_cast<int>(block / blocks.per_row), part = thread % kLanes;
    const uint32_t first = block % blocks.per_row * blocks.per_block + thread / kLanes;
    const int64_t head_row = static_cast<int64_t>(row) * p.heads;
    const T *o[kAtOnce], *d_o[kAtOnce];
    int64_t index[kAtOnce];
    Lse lse[kAtOnce];
    float delta[kAtOnce];
    bool exists[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t vector = first + i * (kPrepareThreads / kLanes);
        const int q = static_cast<int>(vector / p.heads), head = static_cast<int>(vector % p.heads);
        exists[i] = q < p.q_len;
        index[i] = vector < blocks.vectors_per_row && part == 0 ? (head_row + head) * p.q_len_padded + q : -1;
        lse[i] = INFINITY;
        if (exists[i] && part == 0) lse[i] = static_cast<const Lse*>(p.lse)[(head_row + head) * p.q_len + q];
        const int64_t out = ((static_cast<int64_t>(row) * p.q_len + q) * p.heads + head) * p.head_dim;
        d_o[i] = vector_of<T>(p.d_o, p.d_o_stride, p, row, q, head);
        delta[i] = 0.f;
        if (p.gate == nullptr) {
            o[i] = static_cast<const T*>(p.o) + out;
        } else if (exists[i]) {
            delta[i] = gated_delta(p, out, d_o[i], vector_of<T>(p.gate, p.gate_stride, p, row, q, head), part);
        }
    }
    if (p.gate == nullptr) {
        for (int d = part * kChunkElements; d < p.head_dim; d += kLanes * kChunkElements) {
            uint4 x[kAtOnce] = {}, dx[kAtOnce] = {};
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                if (!exists[i]) continue;
                x[i] = *reinterpret_cast<const uint4*>(o[i] + d);
                dx[i] = *reinterpret_cast<const uint4*>(d_o[i] + d);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) delta[i] += dot_chunk<T>(x[i], dx[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int lanes = 1; lanes < kLanes; lanes *= 2) delta[i] += shfl_xor(delta[i], lanes);
        // A row without keys has lse = -inf; +inf makes its P = exp(x - lse) zero. So does a row whose every key is
        // dropped by a finite bias, one half by the mask, the other by the pair bias: an fp32 lse no longer tells its
        // keys apart.
        if (lse[i] == -INFINITY || (sizeof(Lse) == 4 && lse[i] < -1e7f)) lse[i] = INFINITY;
        if (index[i] >= 0) write(index[i], lse[i], delta[i]);
    }
}

template <typename T, typename Write>
DS4SCI_DEVICE void visit_row_stats(const KernelParams& p, uint32_t block, int thread, const Write& write) {
    const VectorBlocks blocks = VectorBlocks::of(p);
    if (blocks.lanes == 1) {
        visit_row_stats<T, 1>(p, blocks, block, thread, write);
    } else if (blocks.lanes == 2) {
        visit_row_stats<T, 2>(p, blocks, block, thread, write);
    } else {
        visit_row_stats<T, VectorBlocks::kMaxLanes>(p, blocks, block, thread, write);
    }
}

template <typename T>
DS4SCI_DEVICE void prepare_row_stats(const KernelParams& p, uint32_t block, int thread) {
    using Lse = typename LseType<T>::type;
    visit_row_stats<T>(p, block, thread, [&](int64_t index, Lse natural_lse, float delta) {
        const Lse lse = natural_lse * static_cast<Lse>(1.4426950408889634074);
        const float lse_high = static_cast<float>(lse);
        p.row_stats[index] = make_float2(lse_high, delta);
        if (p.lse_low != nullptr) p.lse_low[index] = lse_high == INFINITY ? 0.f : static_cast<float>(lse - lse_high);
    });
}

// At least four blocks of 16-bit elements: told nothing, ptxas takes 48 registers for compute capability 10 and 12,
// and spills.
template <typename T>
__global__ void __launch_bounds__(kPrepareThreads, sizeof(T) == 4 ? 0 : 4)
    prepare_kernel(const __grid_constant__ KernelParams p) {
    const PrepareBlocks blocks = PrepareBlocks::of(p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int64_t block = blockIdx.x;
    if (block < blocks.pair) return prepare_pair_row<T>(p, block * kPrepareWarps + warp, lane);
    block -= blocks.pair;
    if (block < blocks.mask) return prepare_mask_row<T>(p, block * kPrepareWarps + warp, lane);
    block -= blocks.mask;
    prepare_row_stats<T>(p, static_cast<uint32_t>(block), threadIdx.x);
}

}  // namespace ds4sci

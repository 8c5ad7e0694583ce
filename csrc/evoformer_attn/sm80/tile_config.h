// SPDX-License-Identifier: Apache-2.0
// Tile sizes of the portable kernels: (element size, padded head dim) -> blocks, warps, rows that share a bias,
// stages. Every choice fits 99 KB of shared memory, what one block may use on sm_86, sm_89 and sm_120.
#pragma once
#include <cstdint>

#include "bias.h"

namespace ds4sci {

// Rows of the MSA or pair tensor that one block handles together. They share each bias fragment, which divides the
// bias traffic and its unpacking by their number. Two fit the registers up to D = 32 (4 spill or halve the occupancy).
template <typename T, int kHeadDim>
constexpr int kMaxRowsPerBlock = sizeof(T) == 2 && kHeadDim <= 32 ? 2 : 1;

constexpr int kMaxSmemBytes = 99 * 1024;

// Blocks of four warps per multiprocessor that the 16-bit forward and dQ kernels up to D = 32 are compiled for: 128
// registers a thread where they do not spill; fewer blocks where shared memory holds no more (sm_86, sm_89, sm_120).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900
constexpr int kSmallHeadDimBlocks = 4;
#elif __CUDA_ARCH__ == 1000
constexpr int kSmallHeadDimBlocks = 3;
#else
constexpr int kSmallHeadDimBlocks = 2;
#endif

template <typename T, int kHeadDim, int kRowsPerBlock>
struct FwdTile {
    static constexpr int kRows = kRowsPerBlock;
    static constexpr int kNumWarps = 4;
    static constexpr int kNumThreads = kNumWarps * 32;
    static constexpr int kBlockM = kNumWarps * 16;  // queries
    // 64 keys amortise the row maximum over more logits; 32 where K, V and P take twice the space.
    static constexpr int kBlockN = 32;
    static constexpr int kStages = sizeof(T) * kHeadDim <= 256 ? 2 : 1;
    static constexpr int kMinBlocks = sizeof(T) == 2 && kHeadDim <= 32 ? kSmallHeadDimBlocks : kHeadDim <= 64 ? 2 : 1;

    static constexpr int kPitch = TilePitch<T, kHeadDim>::kBytes;
    static constexpr int kQueryBytes = kBlockM * kPitch;
    static constexpr int kKeyBytes = kBlockN * kPitch;
    static constexpr int kRowStageBytes = 2 * kKeyBytes + kBlockN * 4;  // K, V, mask of one row
    static constexpr int kStageBytes = kRows * kRowStageBytes;
    static constexpr int kStageOffset = kRows * kQueryBytes;
    static constexpr int kBiasOffset = kStageOffset + kStages * kStageBytes;
    DS4SCI_HOST_DEVICE static constexpr int bias_bytes(int element_bytes) {
        return element_bytes == 0 ? 0 : kBlockM * bias_pitch(kBlockN, element_bytes);
    }
    static constexpr int smem_bytes(int element_bytes) { return kBiasOffset + kStages * bias_bytes(element_bytes); }
    static_assert(smem_bytes(4) <= kMaxSmemBytes, "too much shared memory for sm_86");
};

// dQ: a block owns kBlockM queries of kRows rows and runs over keys. 32 keys at a time keep S, dP and the bias
// fragment in 48 registers, which leaves room for three blocks on a multiprocessor.
template <typename T, int kHeadDim, int kRowsPerBlock>
struct BwdDqTile {
    static constexpr int kRows = kRowsPerBlock;
    static constexpr int kNumWarps = sizeof(T) * kHeadDim <= 256 ? 4 : 2;
    static constexpr int kNumThreads = kNumWarps * 32;
    static constexpr int kBlockM = kNumWarps * 16;
    static constexpr int kBlockN = sizeof(T) * kHeadDim <= 256 ? 32 : 16;
    static constexpr int kStages = sizeof(T) * kHeadDim <= 256 ? 2 : 1;
    static constexpr int kMinBlocks = sizeof(T) == 2 && kHeadDim <= 32 ? kSmallHeadDimBlocks
                                      : sizeof(T) * kHeadDim <= 128    ? 2
                                                                       : 1;

    static constexpr int kPitch = TilePitch<T, kHeadDim>::kBytes;
    static constexpr int kQueryBytes = kBlockM * kPitch;  // Q or dO of one row
    static constexpr int kKeyBytes = kBlockN * kPitch;
    static constexpr int kRowStageBytes = 2 * kKeyBytes + kBlockN * 4;  // K, V, mask of one row
    static constexpr int kStageBytes = kRows * kRowStageBytes;
    static constexpr int kStageOffset = 2 * kRows * kQueryBytes;
    static constexpr int kBiasOffset = kStageOffset + kStages * kStageBytes;
    DS4SCI_HOST_DEVICE static constexpr int bias_bytes(int element_bytes) {
        return element_bytes == 0 ? 0 : kBlockM * bias_pitch(kBlockN, element_bytes);
    }
    static constexpr int smem_bytes(int element_bytes) { return kBiasOffset + kStages * bias_bytes(element_bytes); }
    static_assert(smem_bytes(4) <= kMaxSmemBytes, "too much shared memory for sm_86");
};

// dK, dV: a block owns kBlockN keys of kRows rows and runs over queries; products are transposed, so that P^T and dS^T
// come out as left operands of the second products. kOutputs tells which of dK (with d(mask_bias)) and dV a launch
// computes: in fp32 at D = 128 the accumulators of both leave too few registers, so there each has a launch of its
// own.
constexpr int kDkOnly = 1, kDvOnly = 2, kDkAndDv = 3;
template <typename T, int kHeadDim>
constexpr bool kSplitsDkDv = sizeof(T) * kHeadDim > 256;

template <typename T, int kHeadDim, int kRowsPerBlock, int kOutputs = kDkAndDv>
struct BwdDkvTile {
    static constexpr bool kDk = (kOutputs & kDkOnly) != 0, kDv = (kOutputs & kDvOnly) != 0;
    static constexpr int kRows = kRowsPerBlock;
    static constexpr int kNumWarps = sizeof(T) * kHeadDim <= 256 ? 4 : 2;
    static constexpr int kNumThreads = kNumWarps * 32;
    static constexpr int kBlockN = kNumWarps * 16;                        // keys
    static constexpr int kBlockM = sizeof(T) * kHeadDim <= 256 ? 32 : 8;  // queries
    static constexpr int kStages = sizeof(T) * kHeadDim <= 256 ? 2 : 1;
    static constexpr int kMinBlocks = sizeof(T) == 2 && kHeadDim <= 32 ? 3 : sizeof(T) * kHeadDim <= 128 ? 2 : 1;

    static constexpr int kPitch = TilePitch<T, kHeadDim>::kBytes;
    static constexpr int kKeyBytes = kBlockN * kPitch;  // K or V of one row
    static constexpr int kQueryBytes = kBlockM * kPitch;
    static constexpr int kLowBytes = sizeof(T) == 4 ? kBlockM * 4 : 0;
    static constexpr int kRowStageBytes = 2 * kQueryBytes + kBlockM * 8 + kLowBytes;  // Q, dO, statistics of one row
    static constexpr int kRefsOffset = kRows * kRowStageBytes;  // row references of the pair bias
    static constexpr int kStageBytes = kRefsOffset + kBlockM * 4;
    static constexpr int kMaskOffset =
        2 * kRows * kKeyBytes;  // of the block's keys: registers are scarcer than loads here
    static constexpr int kStageOffset = kMaskOffset + kRows * kBlockN * 4;
    static constexpr int kBiasOffset = kStageOffset + kStages * kStageBytes;
    DS4SCI_HOST_DEVICE static constexpr int bias_bytes(int element_bytes) {
        return element_bytes == 0 ? 0 : kBlockM * bias_pitch(kBlockN, element_bytes);
    }
    static constexpr int smem_bytes(int element_bytes) { return kBiasOffset + kStages * bias_bytes(element_bytes); }
    static_assert(smem_bytes(4) <= kMaxSmemBytes, "too much shared memory for sm_86");
};

// d(pair_bias): a block owns a tile of one head's bias and runs over rows. L2 traffic per logit is 2 D (1/M + 1/N)
// elements, so the tile is as large as registers and shared memory allow.
template <typename T, int kHeadDim>
struct BwdDpairTile {
    static constexpr int kNumWarps = sizeof(T) * kHeadDim <= 256 ? 4 : 2;
    static constexpr int kNumThreads = kNumWarps * 32;
    static constexpr int kBlockM = kNumWarps * 16;
    static constexpr int kBlockN = sizeof(T) * kHeadDim <= 256 ? 64 : 32;
    static constexpr int kChunkN =
        sizeof(T) * kHeadDim <= 256 ? 32 : 16;  // keys whose S and dP are in registers at a time
    static constexpr int kStages = sizeof(T) * kHeadDim <= 128 ? 2 : 1;
    static constexpr int kMinBlocks = sizeof(T) == 2 && kHeadDim <= 32 ? 3 : 1;

    static constexpr int kPitch = TilePitch<T, kHeadDim>::kBytes;
    static constexpr int kQueryBytes = kBlockM * kPitch;  // Q or dO
    static constexpr int kKeyBytes = kBlockN * kPitch;    // K or V
    static constexpr int kMaskOffset = 2 * kQueryBytes + 2 * kKeyBytes;
    static constexpr int kStatsOffset = kMaskOffset + kBlockN * 4;
    static constexpr int kLowOffset = kStatsOffset + kBlockM * 8;
    static constexpr int kStageBytes = kLowOffset + (sizeof(T) == 4 ? kBlockM * 4 : 0);
    static constexpr int kSmemBytes = kStages * kStageBytes;
    static_assert(kSmemBytes <= kMaxSmemBytes, "too much shared memory for sm_86");
};

}  // namespace ds4sci

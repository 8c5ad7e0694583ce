// SPDX-License-Identifier: Apache-2.0
// Tiles in shared memory as the copy engine writes them and wgmma reads them, and the way of results out of registers.
#pragma once
#include <type_traits>

#include "sm90/params.h"
#include "sm90/ptx.h"

namespace ds4sci {

constexpr int kTileRows = 64;  // positions per tile of Q, K, V, dO; queries and keys per tile of the bias
constexpr int kBiasTileBytes = 64 * 64 * 2;  // 128-byte rows, 128-byte swizzle
constexpr int kAuxTileBytes = kTileRows * 16;
constexpr int kSmemAlignment = 1024;  // a swizzle pattern repeats every 1024 bytes at most; kSmemBase is a multiple

// 64 positions of one head: rows of kHeadDim 16-bit elements, swizzled over their own width.
template <int kHeadDim>
struct RowTile {
    static_assert(kHeadDim == 16 || kHeadDim == 32 || kHeadDim == 64, "a row is one swizzle width");
    static constexpr int kRowBytes = kHeadDim * 2;
    static constexpr int kBytes = kTileRows * kRowBytes;
    static constexpr uint32_t kSwizzle = kHeadDim == 64 ? 1 : kHeadDim == 32 ? 2 : 3;
    static constexpr int kGroupBytes = 8 * kRowBytes;

    // As an operand that is summed over the head dim, kDimStep bytes for 16 elements; and as a second operand that is
    // summed over positions, kPositionStep bytes for 16 of them.
    static DS4SCI_DEVICE MatrixOperand over_dim(uint32_t tile) {
        return MatrixOperand::of(tile, 16, kGroupBytes, kSwizzle);
    }
    static constexpr uint32_t kDimStep = 32;
    static DS4SCI_DEVICE MatrixOperand over_positions(uint32_t tile) {
        return MatrixOperand::of(tile, kGroupBytes, kGroupBytes, kSwizzle);
    }
    static constexpr uint32_t kPositionStep = 16 * kRowBytes;

    // s = a b^T over the head dim, 64 rows by 8 * kTiles.
    template <typename T, int kTiles>
    static DS4SCI_DEVICE void product_abt(float (&s)[kTiles][4], MatrixOperand a, MatrixOperand b) {
        wgmma_ss<T, false, false>(s, a, b);
#pragma unroll
        for (int i = 1; i < kHeadDim / 16; ++i)
            wgmma_ss<T, true, false>(s, a.plus(i * kDimStep), b.plus(i * kDimStep));
    }
    // This lane's address of ldmatrix for 16 rows from `row` on as a first operand, summed over the first 16 elements.
    // The next 16 elements are at the address xor 32.
    static DS4SCI_DEVICE uint32_t fragment(uint32_t tile, int row, int lane) {
        row += lane & 15;
        constexpr int kChunks = kRowBytes / 16;  // which the swizzle permutes, by the number of 128-byte lines
        return tile + row * kRowBytes + (((lane >> 4) ^ (row / (8 / kChunks) & (kChunks - 1))) << 4);
    }
    // acc += p b over 64 positions; p in the accumulator layout, packed.
    template <typename T>
    static DS4SCI_DEVICE void product_pb(float (&acc)[kHeadDim / 8][4], const uint32_t (&p)[4][4], MatrixOperand b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma_rs<T, true>(acc, p[i], b.plus(i * kPositionStep));
    }
};

// V as a second operand, with 8 columns of ones beside it: their products are sums over positions. Up to head dim 32
// it is one operand, whose second part along n is a tile of ones anywhere further up in shared memory. Products of 72
// columns would cost the forward at head dim 64 a tenth of its time, so there the ones have products of their own.
template <int kHeadDim>
struct ValuesWithOnes {
    using Rows = RowTile<kHeadDim>;
    static constexpr bool kOneOperand = kHeadDim <= 32;
    static constexpr int kOnesBytes = kOneOperand ? 2 * Rows::kGroupBytes : 256;  // 16 rows of ones
    // The accumulators: with one operand the sums are the last 8 columns of the output's.
    static constexpr int kOutputTiles = kHeadDim / 8 + (kOneOperand ? 1 : 0);
    MatrixOperand values, ones;

    static DS4SCI_DEVICE ValuesWithOnes of(uint32_t tile, uint32_t ones) {
        if constexpr (kOneOperand) {
            const MatrixOperand both = MatrixOperand::of(tile, ones - tile, Rows::kGroupBytes, Rows::kSwizzle);
            return {both, both};
        } else {
            return {Rows::over_positions(tile), MatrixOperand::of(ones, 128, 0, 0)};
        }
    }
    // By all threads of a block. Either way would do for both; the order in which ptxas puts the main loop depends on
    // it, and with that up to 8 % of the time. Each is the one that was timed.
    template <typename T>
    static DS4SCI_DEVICE void write_ones(uint32_t address, int thread, int threads) {
        static_assert(kOneOperand || kOnesBytes / 4 <= 256, "no more words than a block has threads");
        if constexpr (kOneOperand) {
            for (int i = thread; i < kOnesBytes / 4; i += threads) sts_u32(address + i * 4, pack2<T>(1.f, 1.f));
        } else if (static_cast<uint32_t>(thread) < kOnesBytes / 4) {
            sts_u32(address + thread * 4, pack2<T>(1.f, 1.f));
        }
    }
    DS4SCI_DEVICE ValuesWithOnes plus(uint32_t bytes) const {
        return {kOneOperand ? values.plus_before_fixed(bytes) : values.plus(bytes), ones};
    }
    // acc += p V over 64 positions, and the rows' sums of p beside it.
    template <typename T>
    DS4SCI_DEVICE void product(float (&acc)[kOutputTiles][4], float (&sums)[1][4], const uint32_t (&p)[4][4]) const {
        if constexpr (kOneOperand) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                wgmma_rs<T, true>(acc, p[i], values.plus_before_fixed(i * Rows::kPositionStep));
        } else {
            Rows::template product_pb<T>(acc, p, values);
#pragma unroll
            for (int i = 0; i < 4; ++i) wgmma_rs<T, false>(sums, p[i], ones);
        }
    }
};

// 64 x 8 auxiliary values without swizzle. A product of depth 16 reads the 8 twice; where the first operand comes from
// registers, its second half is zero.
DS4SCI_DEVICE MatrixOperand aux_operand(uint32_t tile) { return MatrixOperand::of(tile, 0, 128, 0); }

// First operand of the auxiliary product from this lane's word of each of its two rows: the part that S takes, and the
// part that dP takes.
struct AuxOperand {
    uint32_t words[4];

    static DS4SCI_DEVICE AuxOperand of_s(uint32_t low, uint32_t high, int pair) {
        return {{pair == 3 ? 0u : low, pair == 3 ? 0u : high, 0u, 0u}};
    }
    static DS4SCI_DEVICE AuxOperand of_dp(uint32_t low, uint32_t high, int pair) {
        return {{pair == 3 ? low : 0u, pair == 3 ? high : 0u, 0u, 0u}};
    }
};

// Where in a tile of the pair bias this lane's part of ldmatrix begins, for 16 queries from `row` on. The fragment 16
// keys further is at the address xor 32, and so on.
DS4SCI_DEVICE uint32_t bias_fragment(int row, int lane) {
    return (row + (lane & 15)) * 128 + ((lane >> 4) * 16 ^ (lane & 7) << 4);
}

// Two results of the softmax's logits as one packed pair of the first operand of the next product.
template <typename T>
DS4SCI_DEVICE void pack_operand(uint32_t (&packed)[4], const float (&low)[4], const float (&high)[4]) {
    packed[0] = pack2<T>(low[0], low[1]);
    packed[1] = pack2<T>(low[2], low[3]);
    packed[2] = pack2<T>(high[0], high[1]);
    packed[3] = pack2<T>(high[2], high[3]);
}

// Positions that one warp holds the results of and hands to the copy engine at once.
constexpr int kStoredRows = 16;

// Put the first kHeadDim columns of one warp's accumulator of 16 rows, times a factor per row, where the copy engine
// reads it: `fragment` is this lane's address from RowTile::fragment, in a tile that nobody reads any more.
template <typename T, int kHeadDim, int kTiles>
DS4SCI_DEVICE void stage_rows(uint32_t fragment, const float (&acc)[kTiles][4], float factor_low, float factor_high) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
        uint32_t packed[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float factor = w % 2 ? factor_high : factor_low;
            const float (&x)[4] = acc[2 * i + w / 2];
            packed[w] = pack2<T>(x[w % 2 * 2] * factor, x[w % 2 * 2 + 1] * factor);
        }
        stmatrix_x4(fragment ^ (i * 32), packed);
    }
}

// A ring of stages that one producer fills and warps empty; both ends walk it with a copy of this.
template <int kStages>
struct Ring {
    uint32_t barriers;  // address of kStages full barriers, then kStages empty ones
    int stage = 0;
    uint32_t phase = 0;

    static constexpr int kBytes = 2 * kStages * 8;

    static DS4SCI_DEVICE void init(uint32_t barriers, int releases) {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(barriers + i * 8, 1);
            mbarrier_init(barriers + (kStages + i) * 8, releases);
        }
    }
    DS4SCI_DEVICE uint32_t full() const { return barriers + stage * 8; }
    DS4SCI_DEVICE void wait_full() const { mbarrier_wait(full(), phase); }
    DS4SCI_DEVICE uint32_t test_full() const { return mbarrier_test(full(), phase); }
    DS4SCI_DEVICE void wait_full_unless(uint32_t complete) const { mbarrier_wait_unless(complete, full(), phase); }
    // The producer's side: wait until the stage may be filled, then say how much the copy engine will bring.
    DS4SCI_DEVICE void wait_empty() const { mbarrier_wait(empty(), phase ^ 1); }
    DS4SCI_DEVICE void announce(uint32_t bytes) const { mbarrier_arrive_expect(full(), bytes); }
    DS4SCI_DEVICE uint32_t empty() const { return full() + kStages * 8; }
    DS4SCI_DEVICE void advance() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// The rows (b, n) of a work item as the copy engine counts them: a row past the last one lies outside of the tensor,
// so it reads as zero and is not written.
struct RowCoordinates {
    int b, n;

    DS4SCI_DEVICE static RowCoordinates of(const KernelParams& p, const RowLocation& row) {
        return {row.b, row.valid ? row.n : p.rows};
    }
};

}  // namespace ds4sci

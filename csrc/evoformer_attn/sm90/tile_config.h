// SPDX-License-Identifier: Apache-2.0
// Shapes of the Hopper kernels. A block is a few warpgroups that compute, each on its own row n unless said, and one
// that feeds them.
//
// At head dims up to 32 accumulators are small, so latency is hidden by three or four warpgroups: while one waits for
// its products, the exponentials of the others keep the special function unit busy. Blocks of 128 positions halve what
// K and V (Q and dO) cost in L2 traffic; the rows of a block share the tiles of the pair bias.
#pragma once
#include <cstddef>

#include "sm90/plan.h"
#include "sm90/tile.h"

namespace ds4sci {

constexpr int kSm90MaxSmemBytes = 227 * 1024;

// Threads and registers of a block with kConsumers computing warpgroups: a multiprocessor has 64 K registers, and all
// of a block's threads start with the same number.
template <int kConsumers>
struct BlockShape {
    static_assert(kConsumers >= 2 && kConsumers <= 4, "two to four warpgroups compute");
    static constexpr int kWarpgroups = kConsumers;
    static constexpr int kConsumerWarps = kConsumers * 4;
    static constexpr int kThreads = kConsumers * 128 + 128;
    static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : kConsumers == 3 ? 160 : 112;
};

// Forward and dQ: a block owns 128 queries, two tiles, of kBlockRows rows and runs over keys.
template <typename Shape, int kHeadDim, bool kPair, int kBlockRows>
struct QueryBlock : Shape {
    static constexpr int kRows = kBlockRows;
    static constexpr int kPositions = 2 * kTileRows;
    static constexpr int kTileBytes = RowTile<kHeadDim>::kBytes;

    // A stage: the bias of 128 x 64, then K, V and the key side of the auxiliary product of each row.
    static constexpr int kBiasBytes = kPair ? 2 * kBiasTileBytes : 0;
    static constexpr int kRowBytes = 2 * kTileBytes + kAuxTileBytes;
    static constexpr int kStageBytes = kBiasBytes + kRows * kRowBytes;

    static DS4SCI_DEVICE uint32_t key_tile(uint32_t stage, int row) { return stage + kBiasBytes + row * kRowBytes; }
    static DS4SCI_DEVICE uint32_t value_tile(uint32_t stage, int row) { return key_tile(stage, row) + kTileBytes; }
    static DS4SCI_DEVICE uint32_t aux_tile(uint32_t stage, int row) { return key_tile(stage, row) + 2 * kTileBytes; }
};

// What a warpgroup needs to know of its part of a work item. The producer works it out while the others compute.
struct alignas(16) ItemRecord {
    const void* source;         // forward: gate of its first query, or null; dQ: pair_ref of it
    float* vector_out;          // lse; d(mask_bias)
    int64_t stats;              // dQ: index of its first query in [B, N, H, q_len_padded]
    int32_t first, head, n, b;  // where its results go, as the copy engine counts
    int32_t valid;  // forward, dK, dV: positions from the first one on; at most 0 for a row that does not exist
    int32_t index;  // of the work item
};

// Shared memory of a block that runs through kRingStages stages and holds kBuffers sets of operands of its own
// positions, kOwnBytes for each warpgroup.
template <typename Shape, int kRingStages, int kStageBytes, int kBuffers, int kOwnBytes>
struct SmemLayout {
    static constexpr int kOwnBuffers = kBuffers;
    static constexpr int kOwnOffset = kSmemBase + kRingStages * kStageBytes;
    static constexpr int kBufferBytes = Shape::kWarpgroups * kOwnBytes;  // from one set to the next
    static constexpr int kRecordOffset = kOwnOffset + kBuffers * kBufferBytes;
    static constexpr int kRecordBytes = sizeof(ItemRecord);
    static constexpr int kBarrierOffset = kRecordOffset + kBuffers * Shape::kWarpgroups * kRecordBytes;
    static constexpr int kEnd =
        kBarrierOffset + Ring<kRingStages>::kBytes + Shape::kWarpgroups * Ring<kBuffers>::kBytes;
    static constexpr int kSmemBytes = kEnd - kSmemBase;
    static_assert(kSmemBytes <= kSm90MaxSmemBytes, "too much shared memory");

    using OwnRing = Ring<kBuffers>;
    static DS4SCI_DEVICE OwnRing own_ring(int warpgroup) {
        return {static_cast<uint32_t>(kBarrierOffset + Ring<kRingStages>::kBytes + warpgroup * OwnRing::kBytes)};
    }
    static DS4SCI_DEVICE uint32_t own_tiles(int warpgroup, int buffer) {
        return kOwnOffset + buffer * kBufferBytes + warpgroup * kOwnBytes;
    }
    static DS4SCI_DEVICE uint32_t record(int warpgroup, int buffer) {
        return kRecordOffset + (buffer * Shape::kWarpgroups + warpgroup) * kRecordBytes;
    }
    static DS4SCI_DEVICE uint32_t stage(int index) { return kSmemBase + index * kStageBytes; }
    static DS4SCI_DEVICE Ring<kRingStages> ring() { return {static_cast<uint32_t>(kBarrierOffset)}; }
    // By all threads, before anything else.
    static DS4SCI_DEVICE void init(const void* smem, bool follows_prepare, int own_releases = 128) {
        check_smem_base(smem);
        if (threadIdx.x == 0) {
            Ring<kRingStages>::init(ring().barriers, Shape::kConsumerWarps);
            // All threads signal that they have read what they need: the record, row vectors, K and V of dK and dV;
            // own_releases of them share what is handed back.
            for (int w = 0; w < Shape::kWarpgroups; ++w) OwnRing::init(own_ring(w).barriers, own_releases);
            mbarrier_init_fence();
        }
        start_block(follows_prepare);
    }
};

// In both, warpgroup w owns the two query tiles of row w in turn.
template <int kHeadDim, bool kPair>
using RowBlock = QueryBlock<BlockShape<kHeadDim <= 32 ? 3 : 2>, kHeadDim, kPair, kHeadDim <= 32 ? 3 : 2>;

template <int kHeadDim>
constexpr int kFwdStages = kHeadDim <= 32 ? 4 : 3;
// pair_ref of a warpgroup's queries: at head dim 64 behind their tiles, with what aligns the next ones, as it was
// timed; else there is no room for that, and it lies behind the ones.
template <int kHeadDim, bool kPair>
constexpr int kOwnRefsBytes = kPair && kHeadDim == 64 ? kSmemAlignment : 0;

template <int kHeadDim, bool kPair>
struct Sm90FwdTile
    : RowBlock<kHeadDim, kPair>,
      SmemLayout<RowBlock<kHeadDim, kPair>, kFwdStages<kHeadDim>, RowBlock<kHeadDim, kPair>::kStageBytes, 2,
                 2 * RowTile<kHeadDim>::kBytes + kOwnRefsBytes<kHeadDim, kPair>> {
    // Behind all tiles of V, whose columns they continue: ones, a product with which is a row's sum.
    static constexpr int kOnesOffset = round_up(Sm90FwdTile::kEnd, 128);
    static constexpr int kRefsOffset = kOnesOffset + ValuesWithOnes<kHeadDim>::kOnesBytes;
    static constexpr int kRefsBytes = kPair ? 2 * kTileRows * 4 : 0;
    static constexpr bool kRefsApart = kOwnRefsBytes<kHeadDim, kPair> == 0;
    // `tiles`: own_tiles() of the same arguments.
    static DS4SCI_DEVICE uint32_t refs(uint32_t tiles, int warpgroup, int buffer) {
        if constexpr (kRefsApart) {
            return kRefsOffset + (buffer * Sm90FwdTile::kWarpgroups + warpgroup) * kRefsBytes;
        } else {
            return tiles + 2 * RowTile<kHeadDim>::kBytes;
        }
    }
    static constexpr int kSmemBytes =
        kRefsOffset + (kRefsApart ? Sm90FwdTile::kOwnBuffers * Sm90FwdTile::kWarpgroups * kRefsBytes : 0) - kSmemBase;
    static_assert(kSmemBytes <= kSm90MaxSmemBytes, "too much shared memory");
    static_assert(kSmemBase + kSmemBytes <= 1 << 18, "an operand holds 14 bits of 16-byte units of an address");
};

// Forward with a pair bias and without a running maximum up to head dim 32: a block owns 128 queries of four rows. Two
// warpgroups share two of them, one has the first, one the second tile of queries of both rows, so that it makes the
// bias ready once for two.
template <int kHeadDim>
using TwoRowBlock = QueryBlock<BlockShape<4>, kHeadDim, true, 4>;

template <int kHeadDim>
struct Sm90FwdTwoRowTile : TwoRowBlock<kHeadDim>,
                           SmemLayout<BlockShape<4>, kHeadDim == 32 ? 3 : 4, TwoRowBlock<kHeadDim>::kStageBytes, 2,
                                      2 * RowTile<kHeadDim>::kBytes> {
    static_assert(kHeadDim <= 32, "registers");
    static constexpr int kOwnRows = 2, kTeams = Sm90FwdTwoRowTile::kRows / kOwnRows;
    static_assert(Sm90FwdTwoRowTile::kRows == BlockShape<4>::kWarpgroups, "the layout has a place for each warpgroup");
    // Behind all tiles of V, whose columns they continue: ones, a product with which is a row's sum.
    static constexpr int kOnesOffset = round_up(Sm90FwdTwoRowTile::kEnd, 128);
    static constexpr int kRefsOffset = kOnesOffset + ValuesWithOnes<kHeadDim>::kOnesBytes;
    static constexpr int kRefsBytes = 2 * kTileRows * 4;
    static constexpr int kSmemBytes = kRefsOffset + Sm90FwdTwoRowTile::kOwnBuffers * kTeams * kRefsBytes - kSmemBase;
    static_assert(kSmemBytes <= kSm90MaxSmemBytes, "too much shared memory");
    static_assert(kSmemBase + kSmemBytes <= 1 << 18, "an operand holds 14 bits of 16-byte units of an address");

    // pair_ref of the queries of a team, the two warpgroups with the same rows.
    static DS4SCI_DEVICE uint32_t refs(int team, int buffer) {
        return kRefsOffset + (buffer * kTeams + team) * kRefsBytes;
    }
};

template <int kHeadDim, bool kPair>
constexpr int kDqStages = kHeadDim == 16 || (kHeadDim == 32 && !kPair) ? 4 : 3;

template <int kHeadDim, bool kPair>
struct Sm90BwdDqTile
    : RowBlock<kHeadDim, kPair>,
      SmemLayout<RowBlock<kHeadDim, kPair>, kDqStages<kHeadDim, kPair>, RowBlock<kHeadDim, kPair>::kStageBytes,
                 kHeadDim <= 32 ? 2 : 1, 4 * RowTile<kHeadDim>::kBytes> {
    static constexpr int kOwnBytes = 4 * RowTile<kHeadDim>::kBytes;  // Q, both tiles, then dO
};

// dK and dV: a warpgroup owns 64 keys of one row and runs over queries.
template <int kHeadDim>
struct KeyBlock : BlockShape<kHeadDim <= 32 ? 3 : 2> {
    static constexpr int kKeyTiles = kHeadDim <= 32 ? 1 : 2;
    static constexpr int kRows = KeyBlock::kWarpgroups / kKeyTiles;
    static constexpr int kPositions = kKeyTiles * kTileRows;
    static constexpr int kTileBytes = RowTile<kHeadDim>::kBytes;
};

template <int kHeadDim, bool kPair>
struct KeyStage : KeyBlock<kHeadDim> {
    using Block = KeyBlock<kHeadDim>;
    // The bias, 64 queries high, then Q, dO and the query side of the auxiliary product of each row, then the row
    // references of the bias.
    static constexpr int kBiasBytes = kPair ? Block::kKeyTiles * kBiasTileBytes : 0;
    static constexpr int kRowBytes = 2 * Block::kTileBytes + kAuxTileBytes;
    static constexpr int kRefsOffset = kBiasBytes + Block::kRows * kRowBytes, kRefsBytes = kPair ? kTileRows * 4 : 0;
    static constexpr int kFilledBytes = kRefsOffset + kRefsBytes;
    static constexpr int kStageBytes = round_up(kFilledBytes, kSmemAlignment);
    static constexpr int kStages = 4;

    static DS4SCI_DEVICE uint32_t query_tile(uint32_t stage, int row) { return stage + kBiasBytes + row * kRowBytes; }
    static DS4SCI_DEVICE uint32_t d_o_tile(uint32_t stage, int row) {
        return query_tile(stage, row) + Block::kTileBytes;
    }
    static DS4SCI_DEVICE uint32_t aux_tile(uint32_t stage, int row) {
        return query_tile(stage, row) + 2 * Block::kTileBytes;
    }
};

template <int kHeadDim, bool kPair>
struct Sm90BwdDkvTile
    : KeyStage<kHeadDim, kPair>,
      SmemLayout<KeyBlock<kHeadDim>, KeyStage<kHeadDim, kPair>::kStages, KeyStage<kHeadDim, kPair>::kStageBytes, 2,
                 2 * RowTile<kHeadDim>::kBytes + kAuxTileBytes> {
    // Row references by ldmatrix: fewer instructions, but more reads of shared memory; slower with two warpgroups.
    static constexpr bool kRefsByMatrix = kHeadDim <= kColumnRefsHeadDim;
    // K, V, the key side of the auxiliary product.
    static constexpr int kOwnAuxOffset = 2 * RowTile<kHeadDim>::kBytes, kOwnBytes = kOwnAuxOffset + kAuxTileBytes;
};

// d(pair_bias): a block owns 128 queries x 128 keys of one head, warpgroup w a quarter of them, and runs over rows n.
// Four warpgroups in turn beat two that overlap the products of one step with the sums of another.
template <int kHeadDim>
struct Sm90BwdDpairTile : BlockShape<4> {
    static_assert(kDpairPositions == 2 * kTileRows, "two tiles on either side");
    static constexpr int kTileBytes = RowTile<kHeadDim>::kBytes;
    // A stage: Q, dO, K, V, the query and the key side of the auxiliary product; 128 positions each.
    static constexpr int kQueryOffset = 0, kDOOffset = 2 * kTileBytes, kKeyOffset = 4 * kTileBytes,
                         kValueOffset = 6 * kTileBytes, kQueryAuxOffset = 8 * kTileBytes,
                         kKeyAuxOffset = kQueryAuxOffset + 2 * kAuxTileBytes;
    static constexpr int kStageBytes = kKeyAuxOffset + 2 * kAuxTileBytes;
    static constexpr int kStages = kHeadDim == 64 ? 2 : kHeadDim == 32 ? 5 : 8;
    // Of whole sums. Saves reads of shared memory, which limit the kernel except at head dim 16.
    static constexpr bool kBiasInRegisters = kHeadDim > 16;
    static constexpr int kBiasOffset = kSmemBase + kStages * kStageBytes;
    static constexpr int kBarrierOffset = kBiasOffset + 4 * kBiasTileBytes;
    static constexpr int kLastOffset = kBarrierOffset + Ring<kStages>::kBytes + 8;  // the end of its rows
    static constexpr int kSmemBytes = kLastOffset + 4 - kSmemBase;
    static_assert(kSmemBytes <= kSm90MaxSmemBytes, "too much shared memory");
};

// dQ, dK and dV at once: a block owns a row of one head, goes through its keys 64 a warpgroup at a time, and runs over
// the queries for each. One more warpgroup computes dQ, and copies. kConsumers: see dqkv_warpgroups.
template <int kHeadDim, int kConsumers, bool kPair>
struct Sm90BwdDqkvTile {
    static_assert(kConsumers == 3 || kConsumers == 4, "three or four warpgroups compute");
    static constexpr int kConsumerWarps = kConsumers * 4, kReducerWarps = 4, kThreads = kConsumers * 128 + 128;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 144 : 104,
                         kReducerRegisters = kConsumers == 3 ? 80 : 64;
    static constexpr int kKeys = kConsumers * kTileRows;  // of a pass
    static constexpr bool kRefsByMatrix = kHeadDim <= kColumnRefsHeadDim;
    static constexpr bool kInRegisters = kConsumers == 3 && kHeadDim <= 32;  // K and V as first operands
    static constexpr bool kEarlyBias = kConsumers == 4;                      // read while S is on its way
    // Whether dP starts when three quarters of the exponentials are through, not ahead of them: slower with operands
    // in registers, no faster without a bias.
    static constexpr bool kLateDp = kPair && !kInRegisters;
    static constexpr int kTileBytes = RowTile<kHeadDim>::kBytes;
    // A stage, of 32 queries: the bias, Q, dO, the query side of the auxiliary product, the bias's row references.
    static constexpr int kHalfRows = kTileRows / 2, kHalfBytes = kTileBytes / 2, kBiasHalfBytes = kBiasTileBytes / 2;
    static constexpr int kHalfAuxBytes = kAuxTileBytes / 2, kHalfRefsBytes = kHalfRows * 4;
    static constexpr int kQueryOffset = kPair ? kConsumers * kBiasHalfBytes : 0, kDOOffset = kQueryOffset + kHalfBytes,
                         kAuxOffset = kDOOffset + kHalfBytes, kRefsOffset = kAuxOffset + kHalfAuxBytes;
    static constexpr int kStageBytes = round_up(kRefsOffset + (kPair ? kHalfRefsBytes : 0), kSmemAlignment);
    // Two slots of dS and as many stages as then fit, at most eight; at head dim 64 a fourth stage is worth more than
    // a second slot.
    static constexpr int kStages = kHeadDim == 64    ? 4
                                   : kConsumers == 4 ? (kHeadDim == 32 ? 4 : 6)
                                   : kHeadDim == 32  ? 7
                                                     : 8;
    // Twice, of each warpgroup: K, V, the key side of the auxiliary product.
    static constexpr int kOwnAuxOffset = 2 * kTileBytes, kOwnBytes = kOwnAuxOffset + kAuxTileBytes;
    static constexpr int kKeyBuffers = 2, kKeysOffset = kSmemBase + kStages * kStageBytes;
    // dS^T: slots of 64 queries and a tile for each warpgroup.
    static constexpr int kSlots = kHeadDim == 64 ? 1 : 2, kSlotBytes = kConsumers * RowTile<64>::kBytes;
    static constexpr int kDsOffset = kKeysOffset + kKeyBuffers * kConsumers * kOwnBytes;
    static constexpr int kStagingOffset = kDsOffset + kSlots * kSlotBytes;  // of dQ, on its way out
    // A record is read at the end of its pass, when the keys of the one after the next may be there already.
    static constexpr int kRecords = 4;
    static constexpr int kRecordOffset = kStagingOffset + kTileBytes, kRecordBytes = sizeof(ItemRecord);
    static constexpr int kBarrierOffset = kRecordOffset + kRecords * kConsumers * kRecordBytes;
    static constexpr int kBarriers = kStages + kKeyBuffers + 3 * kSlots;
    static constexpr int kSmemBytes = kBarrierOffset + kBarriers * 8 - kSmemBase;
    static_assert(kSmemBytes <= kSm90MaxSmemBytes, "too much shared memory");
    static_assert(kSmemBase + kSmemBytes <= 1 << 18, "an operand holds 14 bits of 16-byte units of an address");

    static DS4SCI_DEVICE uint32_t stage(int index) { return kSmemBase + index * kStageBytes; }
    static DS4SCI_DEVICE Ring<kStages> ring() { return {static_cast<uint32_t>(kBarrierOffset)}; }
    static DS4SCI_DEVICE Ring<kKeyBuffers> key_ring() { return {static_cast<uint32_t>(kBarrierOffset + kStages * 8)}; }
    static DS4SCI_DEVICE uint32_t own_tiles(int warpgroup, int buffer) {
        return kKeysOffset + (buffer * kConsumers + warpgroup) * kOwnBytes;
    }
    // Number of a pass, modulo kRecords.
    static DS4SCI_DEVICE int sequence(const Ring<kKeyBuffers>& keys) { return keys.phase * kKeyBuffers + keys.stage; }
    static DS4SCI_DEVICE uint32_t record(int warpgroup, int sequence) {
        return kRecordOffset + (sequence * kConsumers + warpgroup) * kRecordBytes;
    }
    static DS4SCI_DEVICE uint32_t record_valid(int warpgroup, int sequence) {
        return record(warpgroup, sequence) + offsetof(ItemRecord, valid);
    }
    static DS4SCI_DEVICE uint32_t ds_slot(int slot) { return kDsOffset + slot * kSlotBytes; }
    // Both halves of a slot are there; it is free.
    static DS4SCI_DEVICE uint32_t ds_full(int slot, int half) {
        return kBarrierOffset + (kStages + kKeyBuffers + slot * 2 + half) * 8;
    }
    static DS4SCI_DEVICE uint32_t ds_empty(int slot) {
        return kBarrierOffset + (kStages + kKeyBuffers + 2 * kSlots + slot) * 8;
    }
    // By all threads, before anything else.
    static DS4SCI_DEVICE void init(const void* smem, bool follows_prepare) {
        check_smem_base(smem);
        if (threadIdx.x == 0) {
            for (int i = 0; i < kStages; ++i) mbarrier_init(ring().barriers + i * 8, kPair ? 4 : 2);
            for (int i = 0; i < kKeyBuffers; ++i) mbarrier_init(key_ring().barriers + i * 8, kConsumers);
            for (int i = 0; i < kSlots; ++i) {
                mbarrier_init(ds_full(i, 0), kConsumerWarps);
                mbarrier_init(ds_full(i, 1), kConsumerWarps);
                mbarrier_init(ds_empty(i), kReducerWarps);
            }
            mbarrier_init_fence();
        }
        start_block(follows_prepare);
    }
};

}  // namespace ds4sci

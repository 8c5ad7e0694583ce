// SPDX-License-Identifier: Apache-2.0
// What the forward and the dQ kernel share: what they stream, the pair bias, K, V and the key side of the auxiliary
// product, and the way out of what they compute for two tiles of queries.
#pragma once
#include "sm90/tile_config.h"

namespace ds4sci {

// By one thread. Fills a stage with 64 keys from `key` on for the queries from q0 on.
template <typename Tile>
DS4SCI_DEVICE void load_key_stage(const Sm90Params& p, uint32_t stage, uint32_t barrier,
                                  const RowLocation (&rows)[Tile::kRows], int key, int q0, int head, int pair_head,
                                  int pair_group) {
    if (Tile::kBiasBytes > 0) {
        tma_load(stage, &p.pair_map, barrier, key, q0, pair_head, pair_group);
        tma_load(stage + kBiasTileBytes, &p.pair_map, barrier, key, q0 + kTileRows, pair_head, pair_group);
    }
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
        const RowCoordinates at = RowCoordinates::of(p, rows[r]);
        tma_load(Tile::key_tile(stage, r), &p.k_map, barrier, 0, key, head, at.n, at.b);
        tma_load(Tile::value_tile(stage, r), &p.v_map, barrier, 0, key, head, at.n, at.b);
        bulk_load(Tile::aux_tile(stage, r), p.key_aux + p.key_row(rows[r].b, rows[r].n) * p.k_len_padded + key,
                  kAuxTileBytes, barrier);
    }
}

// By one thread. Fills stages with all keys, one after the other. dQ, which counts tiles, has this loop for itself:
// with this one its machine code is another, which was not timed.
template <typename Tile, typename StageRing>
DS4SCI_DEVICE void stream_keys(const Sm90Params& p, StageRing& ring, const RowLocation (&rows)[Tile::kRows], int q0,
                               const WorkItem& item) {
    const int pair_head = p.pair_heads == 1 ? 0 : item.head, pair_group = p.pair_batch == 1 ? 0 : item.group;
    for (int key = 0; key < p.k_len; key += kTileRows) {
        ring.wait_empty();
        ring.announce(Tile::kStageBytes);
        load_key_stage<Tile>(p, Tile::stage(ring.stage), ring.full(), rows, key, q0, item.head, pair_head, pair_group);
        ring.advance();
    }
}

// Hands a warp's part of two tiles of results, staged one behind the other, to the copy engine.
template <typename Rows>
DS4SCI_DEVICE void start_query_stores(const CUtensorMap& map, uint32_t staged, int warp_row, const ItemRecord& record,
                                      int lane) {
    async_proxy_fence();
    warp_sync();
    if (lane == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            tma_store(&map, staged + half * Rows::kBytes + warp_row * Rows::kRowBytes, 0,
                      record.first + half * kTileRows + warp_row, record.head, record.n, record.b);
        tma_store_commit();
    }
}

}  // namespace ds4sci

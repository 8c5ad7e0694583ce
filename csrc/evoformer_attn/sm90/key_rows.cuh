// SPDX-License-Identifier: Apache-2.0
// What the kernels share whose products are transposed, dK/dV and dQ/dK/dV: a warp has 16 keys as rows and runs over
// queries. Their exponentials are not here: as a function those change ptxas's order of the main loop of dK/dV.
#pragma once
#include "sm90/tile_config.h"

namespace ds4sci {

// Where in a tile of the pair bias, whose rows are queries, this lane's part of a transposed ldmatrix begins, for the
// 16 keys from warp_row on and the first 16 queries.
DS4SCI_DEVICE uint32_t transposed_bias_fragment(int warp_row, int lane) {
    return ((lane >> 4) * 8 + (lane & 7)) * 128 + ((warp_row * 2 + ((lane >> 3) & 1) * 16) ^ ((lane & 7) << 4));
}

// Of d(mask_bias) of one head: sums of dS over queries, of keys quad and quad + 8.
DS4SCI_DEVICE void add_key_sums(float (&sums)[2], const float (&ds)[4][4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        sums[0] += ds[j][0] + ds[j][1];
        sums[1] += ds[j][2] + ds[j][3];
    }
}
DS4SCI_DEVICE void store_key_sums(const ItemRecord& record, float (&sums)[2], int warp_row, int lane) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sums[i] += shfl_xor(sums[i], 1);
        sums[i] += shfl_xor(sums[i], 2);
        const int key = warp_row + (lane >> 2) + 8 * i;
        if ((lane & 3) == 0 && key < record.valid) record.vector_out[key] = sums[i];
    }
}

}  // namespace ds4sci

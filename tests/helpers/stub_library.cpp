// SPDX-License-Identifier: Apache-2.0
// The compiled library's C interface without its kernels: what a call costs before any of them, and what they are
// told. Every path computes nothing and keeps a copy of the parameters of its last call.
#include "params.h"

namespace {

// As the library's for a mask and a pair bias: 256-byte pieces that grow with the lengths.
int64_t workspace_bytes(const ds4sci::EvoformerParams& p, bool backward) {
    const int64_t vectors = static_cast<int64_t>(p.batch) * p.rows * p.heads * p.q_len;
    const int64_t bytes = 4 * (static_cast<int64_t>(p.batch) * p.rows * p.k_len + int64_t{p.heads} * p.q_len) +
                          (backward ? 8 * vectors : 0);
    return (bytes + 255) / 256 * 256;
}

}  // namespace

extern "C" {
int64_t ds4sci_evoformer_params_size() { return sizeof(ds4sci::EvoformerParams); }
const char* ds4sci_evoformer_status_string(int32_t) { return "a status of the stub"; }
}

// The four functions of one path, and what its last call was told.
#define DS4SCI_STUB_PATH(PREFIX, SPLITS)                                                                              \
    extern "C" {                                                                                                      \
    ds4sci::EvoformerParams PREFIX##last;                                                                             \
    int32_t PREFIX##calls[2];                                                                                         \
    int64_t PREFIX##workspace_bytes(const ds4sci::EvoformerParams* params, int32_t backward) {                        \
        return workspace_bytes(*params, backward != 0);                                                               \
    }                                                                                                                 \
    int32_t PREFIX##dpair_splits(const ds4sci::EvoformerParams*, int32_t) { return SPLITS; }                          \
    int32_t PREFIX##fwd(const ds4sci::EvoformerParams* params) {                                                      \
        PREFIX##last = *params;                                                                                       \
        PREFIX##calls[0] += 1;                                                                                        \
        return 0;                                                                                                     \
    }                                                                                                                 \
    int32_t PREFIX##bwd(const ds4sci::EvoformerParams* params) {                                                      \
        PREFIX##last = *params;                                                                                       \
        PREFIX##calls[1] += 1;                                                                                        \
        return 0;                                                                                                     \
    }                                                                                                                 \
    }

DS4SCI_STUB_PATH(ds4sci_evoformer_, 1)
#ifdef DS4SCI_WITH_SM90
DS4SCI_STUB_PATH(ds4sci_evoformer_sm90_, 2)
#endif

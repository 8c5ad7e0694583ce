// SPDX-License-Identifier: Apache-2.0
//
// C entry point to DeepSpeed's own backward:
// `attention_bwd(do, q, k, v, o, lse, delta, bias1, bias2, dq, dk, dv, dbias1, dbias2)`.
#include "dispatch.h"

#include "attention_back.cu"

// `allocate` provides the fp32 workspace; it is called at most once per call, with a size in bytes.
extern "C" PEER_EXPORT const char* deepspeed_attention_bwd(torch::Tensor* t, void* (*allocate)(int64_t bytes)) {
    torch::allocate() = allocate;
    return peer_guarded([&] {
        attention_back_impl(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11], t[12], t[13]);
    });
}

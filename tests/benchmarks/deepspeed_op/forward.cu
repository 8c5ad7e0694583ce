// SPDX-License-Identifier: Apache-2.0
//
// C entry point to DeepSpeed's own forward: `attention(q, k, v, bias1, bias2, o, lse)`.
#include "dispatch.h"

#include "attention_cu.cu"

extern "C" PEER_EXPORT const char* deepspeed_attention(torch::Tensor* t) {
    return peer_guarded([&] { attention_impl(t[0], t[1], t[2], t[3], t[4], t[5], t[6]); });
}

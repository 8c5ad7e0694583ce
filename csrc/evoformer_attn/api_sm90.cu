// SPDX-License-Identifier: Apache-2.0
// The Hopper kernels' entry points; the same arguments and results as those of api.cu.
#include "entry.h"
#include "sm90/launch.h"
#include "sm90/plan.h"
#include "sm90/tensor_maps.h"

namespace ds4sci {
namespace {

// What these kernels do not take, and another implementation does.
int32_t check_sm90(const EvoformerParams& p) {
    if (p.dtype != kFloat16 && p.dtype != kBFloat16) return kInvalidDtype;
    if (p.pair_bias != nullptr && p.pair_dtype != p.dtype) return kInvalidDtype;
    if (p.head_dim > 64) return kInvalidHeadDim;
    if (!(p.softmax_scale > 0.f)) return kInvalidArgument;
    return 0;
}

int64_t num_forward_items(const KernelParams& p) {
    return static_cast<int64_t>(ceil_div(p.q_len, 2 * kTileRows)) *
           ceil_div(p.rows_per_group, sm90_rows_per_block(p.head_dim)) * p.heads * p.num_groups;
}

// Of the current GPU; 0 if they cannot be counted.
int32_t num_multiprocessors() {
    int32_t count = 0;
    return count_multiprocessors(&count) == cudaSuccess ? count : 0;
}

// What the blocks of the kernel of dQ, dK and dV keep between two passes over the keys.
int64_t dq_scratch_elements(const KernelParams& p) {
    const int32_t num_sms = num_multiprocessors();
    if (!takes_dqkv(p, num_sms)) return 0;
    if (p.k_len <= dqkv_warpgroups(p.head_dim, p.k_len) * kTileRows) return 0;
    const int padded_head_dim = p.head_dim <= 16 ? 16 : p.head_dim <= 32 ? 32 : 64;
    return static_cast<int64_t>(num_sms) * p.q_len_padded * padded_head_dim;
}

Sm90Params make_sm90_params(const EvoformerParams& params, bool backward, int64_t* workspace_bytes) {
    Sm90Params p{};
    static_cast<KernelParams&>(p) = basic_kernel_params(params);
    if (!backward) p.d_o = nullptr;
    // What lies side by side in memory comes together, unless the bias of all heads at once would not stay in L2, of
    // which a Hopper GPU has 50 MB, half of it close.
    constexpr int64_t kResidentBiasBytes = static_cast<int64_t>(24) << 20;
    const int64_t bias_bytes = static_cast<int64_t>(p.pair_heads) * p.q_len * p.k_len * p.pair_element_bytes();
    p.heads_before_rows = p.pair_bias == nullptr || bias_bytes <= kResidentBiasBytes;
    WorkspaceCursor cursor{static_cast<unsigned char*>(params.workspace)};
    p.key_aux = cursor.take<uint4>(p.num_key_rows() * p.k_len_padded);
    if (p.pair_bias != nullptr) {
        const int64_t pair_rows = static_cast<int64_t>(p.pair_batch) * p.pair_heads * p.q_len_padded;
        p.pair_max = cursor.take<float>(pair_rows);
        p.pair_ref = cursor.take<float>(pair_rows);
        if (backward && p.head_dim <= kColumnRefsHeadDim) p.pair_ref_columns = cursor.take<float>(pair_rows);
    }
    if (backward) {
        const int64_t vectors = static_cast<int64_t>(p.batch) * p.rows * p.heads * p.q_len_padded;
        p.query_aux = cursor.take<uint4>(vectors);
        take_gated_d_o(p, cursor);
        p.dq_scratch = cursor.take<float>(dq_scratch_elements(p));
        if (wants_dpair(p) && factors_dpair(p)) {
            p.num_items = static_cast<int32_t>(num_dpair_blocks(p));
            p.redo = cursor.take<uint32_t>(num_dpair_blocks(p) + 1);
        }
    } else {
        const int64_t items = num_forward_items(p);
        p.num_items = static_cast<int32_t>(items);
        p.row_kept = cursor.take<uint32_t>(p.num_key_rows());
        p.redo = cursor.take<uint32_t>(items + 1);
    }
    if (workspace_bytes != nullptr) *workspace_bytes = cursor.used;
    return p;
}

}  // namespace
}  // namespace ds4sci

using namespace ds4sci;

#define DS4SCI_SM90_DTYPE_SWITCH(DTYPE, ...)                                                                          \
    [&]() -> int32_t {                                                                                                \
        if ((DTYPE) == kFloat16) {                                                                                    \
            using T = fp16;                                                                                           \
            return __VA_ARGS__();                                                                                     \
        }                                                                                                             \
        using T = bf16;                                                                                               \
        return __VA_ARGS__();                                                                                         \
    }()
#define DS4SCI_SM90_HEAD_DIM_SWITCH(HEAD_DIM, ...)                                                                    \
    [&]() -> int32_t {                                                                                                \
        if ((HEAD_DIM) <= 16) {                                                                                       \
            constexpr int kHeadDim = 16;                                                                              \
            return __VA_ARGS__();                                                                                     \
        }                                                                                                             \
        if ((HEAD_DIM) <= 32) {                                                                                       \
            constexpr int kHeadDim = 32;                                                                              \
            return __VA_ARGS__();                                                                                     \
        }                                                                                                             \
        constexpr int kHeadDim = 64;                                                                                  \
        return __VA_ARGS__();                                                                                         \
    }()

extern "C" int64_t ds4sci_evoformer_sm90_workspace_bytes(const EvoformerParams* params, int32_t backward) {
    int64_t bytes = 0;
    make_sm90_params(*params, backward != 0, &bytes);
    return bytes;
}

extern "C" int32_t ds4sci_evoformer_sm90_dpair_splits(const EvoformerParams* params, int32_t num_sms) {
    return params->pair_bias == nullptr ? 1 : dpair_shares(basic_kernel_params(*params), num_sms);
}

extern "C" int32_t ds4sci_evoformer_sm90_fwd(const EvoformerParams* params) {
    if (const int32_t status = check(*params)) return status;
    if (const int32_t status = check_sm90(*params)) return status;
    Sm90Params p = make_sm90_params(*params, false, nullptr);
    if (num_forward_items(p) != p.num_items) return cudaErrorInvalidConfiguration;
    return DS4SCI_SM90_DTYPE_SWITCH(p.dtype, [&] {
        return DS4SCI_SM90_HEAD_DIM_SWITCH(p.head_dim, [&] {
            cudaError_t status = encode_maps(p, kHeadDim);
            if (status == cudaSuccess) status = run_sm90_prepare<T>(p);
            if (status == cudaSuccess) status = run_sm90_fwd<T, kHeadDim>(p);
            return static_cast<int32_t>(status);
        });
    });
}

extern "C" int32_t ds4sci_evoformer_sm90_bwd(const EvoformerParams* params) {
    if (const int32_t status = check_backward(*params)) return status;
    if (const int32_t status = check_sm90(*params)) return status;
    if (params->dpair_out != nullptr && params->dpair_bias == nullptr && params->dpair_splits != 1)
        return kInvalidArgument;
    Sm90Params p = make_sm90_params(*params, true, nullptr);
    const bool with_dpair = wants_dpair(p);
    if (with_dpair && p.dpair_splits > p.rows_per_group) return kInvalidArgument;  // a share would have no rows
    return DS4SCI_SM90_DTYPE_SWITCH(p.dtype, [&] {
        return DS4SCI_SM90_HEAD_DIM_SWITCH(p.head_dim, [&] {
            cudaError_t status = run_sm90_prepare<T>(p);
            read_gated_d_o(p);
            // Of the kernel of dQ, dK and dV, which takes 32 queries at a time, unlike the one of d(pair_bias) before
            // it.
            constexpr int kHalfTile = kTileRows / 2;
            const bool with_dqkv = takes_dqkv(p, num_multiprocessors());
            if (status == cudaSuccess)
                status = encode_maps(p, kHeadDim, with_dqkv && !with_dpair ? kHalfTile : kTileRows);
            p.follows_prepare = true;
            const Sm90Params of_dpair = p;  // whose tiles of queries are whole, unlike those of the kernel behind it
            if (status == cudaSuccess && with_dpair) {
                status = run_sm90_bwd_dpair<T, kHeadDim>(p);
                p.follows_prepare = false;
            }
            if (with_dqkv) {
                if (status == cudaSuccess && with_dpair) status = encode_query_maps(p, kHeadDim, kHalfTile);
                if (status == cudaSuccess) status = run_sm90_bwd_dqkv<T, kHeadDim>(p);
            } else {
                if (status == cudaSuccess && p.dq != nullptr) {
                    status = run_sm90_bwd_dq<T, kHeadDim>(p);
                    p.follows_prepare = false;
                }
                if (status == cudaSuccess && (p.dk != nullptr || p.dmask_bias != nullptr))
                    status = run_sm90_bwd_dkv<T, kHeadDim>(p);
            }
            if (status == cudaSuccess && with_dpair) status = run_sm90_bwd_marked_dpair<T, kHeadDim>(of_dpair);
            if (status == cudaSuccess) status = finish_dpair(p);
            return static_cast<int32_t>(status);
        });
    });
}

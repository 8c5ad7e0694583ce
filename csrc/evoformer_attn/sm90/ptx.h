// SPDX-License-Identifier: Apache-2.0
// Raw PTX for sm_90a: mbarriers, the bulk copy engine (TMA), wgmma. What older architectures have is in ../ptx.h.
#pragma once
#include <cuda.h>

#include "device.h"

namespace ds4sci {

template <typename T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

// Where dynamic shared memory begins in a kernel without any other: behind the 1024 bytes that the system keeps. As a
// constant it folds into every address; asked for, the compiler computes it again in every iteration of every loop.
constexpr uint32_t kSmemBase = 1024;
DS4SCI_DEVICE void check_smem_base(const void* smem) {
    if (smem_address(smem) != kSmemBase) __trap();
}

// ---- mbarrier ----
DS4SCI_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
DS4SCI_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DS4SCI_DEVICE void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One instruction: a branch between asynchronous products would cost registers and may serialise them.
DS4SCI_DEVICE void mbarrier_arrive_if(uint32_t barrier, bool condition) {
    asm volatile(
        "{\n"
        ".reg .pred P;\n"
        "setp.ne.u32 P, %1, 0;\n"
        "@P mbarrier.arrive.shared::cta.b64 _, [%0];\n"
        "}" ::"r"(barrier),
        "r"(static_cast<uint32_t>(condition))
        : "memory");
}
// One arrival; the phase also waits for `bytes` written by the copy engine.
DS4SCI_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DS4SCI_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred P;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1, 0x989680;\n"
        "@P bra DONE_%=;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Whether the phase is complete, after a moment's wait at most; for mbarrier_wait_unless, with other work in between.
DS4SCI_DEVICE uint32_t mbarrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t complete;
    asm volatile(
        "{\n"
        ".reg .pred P;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 P, [%1], %2;\n"
        "selp.u32 %0, 1, 0, P;\n"
        "}"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
    return complete;
}
DS4SCI_DEVICE void mbarrier_wait_unless(uint32_t complete, uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred P;\n"
        "setp.ne.u32 P, %2, 0;\n"
        "WAIT_%=:\n"
        "@P bra DONE_%=;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1, 0x989680;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n"
        "}" ::"r"(barrier),
        "r"(parity), "r"(complete)
        : "memory");
}

// ---- copy engine ----
// Coordinates count elements, innermost first; elements outside of the tensor read as zero and are not written.
DS4SCI_DEVICE void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t barrier, int d, int l, int h, int n,
                            int b) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6,%7}], "
        "[%2];" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(d), "r"(l), "r"(h), "r"(n), "r"(b)
        : "memory");
}
DS4SCI_DEVICE void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t barrier, int key, int query, int h, int b) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], "
        "[%2];" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(key), "r"(query), "r"(h), "r"(b)
        : "memory");
}
DS4SCI_DEVICE void tma_store(const CUtensorMap* map, uint32_t src, int d, int l, int h, int n, int b) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2,%3,%4,%5,%6}], [%1];" ::"l"(map),
                 "r"(src), "r"(d), "r"(l), "r"(h), "r"(n), "r"(b)
                 : "memory");
}
DS4SCI_DEVICE void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(barrier)
                 : "memory");
}
DS4SCI_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the copy engine has read the shared memory of every store of this thread.
DS4SCI_DEVICE void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and of wgmma.
DS4SCI_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DS4SCI_DEVICE void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// log2; -inf for 0. Of numbers in [0.5, 2] up to 2^-22 off, of others two units in the last place.
DS4SCI_DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The largest of three numbers from 0 on, in one instruction: their bits are in the same order. NaN is the largest.
DS4SCI_DEVICE float max_of_non_negative(float a, float b, float c) {
    return __int_as_float(__vimax3_s32(__float_as_int(a), __float_as_int(b), __float_as_int(c)));
}

// Write one warp's 16 x 16 elements, packed as a product's first operand, as four 8 x 8 matrices; lane i gives the
// address of one row of matrix i / 8.
DS4SCI_DEVICE void stmatrix_x4(uint32_t address, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

// Four sums of this thread's alone, in memory that the L2 holds.
DS4SCI_DEVICE void load_cached(float (&x)[4], const float* src) {
    const float4 found = __ldcg(reinterpret_cast<const float4*>(src));
    x[0] = found.x, x[1] = found.y, x[2] = found.z, x[3] = found.w;
}
DS4SCI_DEVICE void store_cached(float* dst, const float (&x)[4]) {
    __stcg(reinterpret_cast<float4*>(dst), make_float4(x[0], x[1], x[2], x[3]));
}

// The same value, of unknown origin to the compiler: kept in a register rather than computed again.
DS4SCI_DEVICE uint32_t kept(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}
DS4SCI_DEVICE int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
template <typename Value>
DS4SCI_DEVICE void store_record(uint32_t address, const Value& value) {
    static_assert(sizeof(Value) % 16 == 0, "whole 16-byte words");
    const uint4* words = reinterpret_cast<const uint4*>(&value);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Value) / 16); ++i)
        asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address + i * 16), "r"(words[i].x), "r"(words[i].y),
                     "r"(words[i].z), "r"(words[i].w)
                     : "memory");
}
template <typename Value>
DS4SCI_DEVICE Value load_record(uint32_t address) {
    Value value;
    uint4* words = reinterpret_cast<uint4*>(&value);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Value) / 16); ++i) words[i] = lds_u32x4(address + i * 16);
    return value;
}
DS4SCI_DEVICE uint32_t lds_u32(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}

// ---- kernels that overlap ----
// Until every kernel launched before in the stream is complete and its results are visible.
DS4SCI_DEVICE void wait_for_previous_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// In place of that in a kernel whose predecessor has waited for all that it reads: complete, but the cache of this
// multiprocessor may hold what was at those addresses before.
DS4SCI_DEVICE void see_what_is_complete() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// The next kernel may start where this one leaves multiprocessors free.
DS4SCI_DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// By all threads when barriers are initialised. waits: whether what this kernel reads may not be complete yet.
DS4SCI_DEVICE void start_block(bool waits) {
    if (waits) {
        wait_for_previous_kernels();
    } else {
        see_what_is_complete();
    }
    let_next_kernel_start();
    block_sync();
}

// Hand registers from warpgroups that copy to warpgroups that compute.
template <int kRegisters>
DS4SCI_DEVICE void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DS4SCI_DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- wgmma: d (+)= a b, m64 n(8 * kTiles) k16, fp32 accumulation ----
// Accumulator layout: warp w of the warpgroup holds rows 16 w .. 16 w + 15 as in mma.m16n8 (tile_mma.h).
DS4SCI_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DS4SCI_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
DS4SCI_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving reads of an accumulator up across the wait for it.
template <int kTiles>
DS4SCI_DEVICE void wgmma_complete(float (&d)[kTiles][4]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[j][e])::"memory");
    }
}

// An operand in shared memory, as wgmma takes it. Built once; other tiles of the same kind are a constant further.
struct MatrixOperand {
    uint32_t low, high;

    // `swizzle`: 0 none, 1, 2, 3 for rows of 128, 64, 32 bytes.
    static DS4SCI_DEVICE MatrixOperand of(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes,
                                          uint32_t swizzle) {
        return {address >> 4 | leading_bytes >> 4 << 16, stride_bytes >> 4 | swizzle << 30};
    }
    DS4SCI_DEVICE MatrixOperand plus(uint32_t bytes) const { return {low + (bytes >> 4), high}; }
    // The same where the leading distance leads to a fixed place: it shrinks by what the address grows.
    DS4SCI_DEVICE MatrixOperand plus_before_fixed(uint32_t bytes) const { return {low - (bytes >> 4) * 0xffff, high}; }
    DS4SCI_DEVICE uint64_t bits() const { return static_cast<uint64_t>(high) << 32 | low; }
};

#define DS4SCI_ACC4(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define DS4SCI_ACC_N8(d) DS4SCI_ACC4(d, 0)
#define DS4SCI_ACC_N16(d) DS4SCI_ACC4(d, 0), DS4SCI_ACC4(d, 1)
#define DS4SCI_ACC_N24(d) DS4SCI_ACC_N16(d), DS4SCI_ACC4(d, 2)
#define DS4SCI_ACC_N32(d) DS4SCI_ACC_N16(d), DS4SCI_ACC4(d, 2), DS4SCI_ACC4(d, 3)
#define DS4SCI_ACC_N40(d) DS4SCI_ACC_N32(d), DS4SCI_ACC4(d, 4)
#define DS4SCI_ACC_N64(d) DS4SCI_ACC_N32(d), DS4SCI_ACC4(d, 4), DS4SCI_ACC4(d, 5), DS4SCI_ACC4(d, 6), DS4SCI_ACC4(d, 7)
#define DS4SCI_REGISTERS_N8 "{%0,%1,%2,%3}"
#define DS4SCI_REGISTERS_N16 "{%0,%1,%2,%3,%4,%5,%6,%7}"
#define DS4SCI_REGISTERS_N24 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11}"
#define DS4SCI_REGISTERS_N32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
#define DS4SCI_REGISTERS_N40 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19}"
#define DS4SCI_REGISTERS_N64                                                                                          \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%"                                        \
    "20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"

// A and B in shared memory. kAdd: adds to d, else replaces it. kTransposed: B's rows are contiguous along n instead of
// along k; kTransposedA: A's along m.
#define DS4SCI_WGMMA_SS(N, FORMAT, A, B, ADD, TRANSPOSED_A, TRANSPOSED)                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." FORMAT " " DS4SCI_REGISTERS_N##N                   \
                 ",%" #A ",%" #B ",%" #ADD ",1,1,%" #TRANSPOSED_A ",%" #TRANSPOSED ";"                                \
                 : DS4SCI_ACC_N##N(d)                                                                                 \
                 : "l"(a.bits()), "l"(b.bits()), "n"(kAdd ? 1 : 0), "n"(kTransposedA ? 1 : 0),                        \
                   "n"(kTransposed ? 1 : 0))
template <typename T, bool kAdd, bool kTransposed, bool kTransposedA = false, int kTiles>
DS4SCI_DEVICE void wgmma_ss(float (&d)[kTiles][4], MatrixOperand a, MatrixOperand b) {
    static_assert(kTiles == 2 || kTiles == 4 || kTiles == 8, "n is 16, 32 or 64");
    if constexpr (kTiles == 2 && kIsBf16<T>) {
        DS4SCI_WGMMA_SS(16, "bf16.bf16", 8, 9, 10, 11, 12);
    } else if constexpr (kTiles == 2) {
        DS4SCI_WGMMA_SS(16, "f16.f16", 8, 9, 10, 11, 12);
    } else if constexpr (kTiles == 4 && kIsBf16<T>) {
        DS4SCI_WGMMA_SS(32, "bf16.bf16", 16, 17, 18, 19, 20);
    } else if constexpr (kTiles == 4) {
        DS4SCI_WGMMA_SS(32, "f16.f16", 16, 17, 18, 19, 20);
    } else if constexpr (kIsBf16<T>) {
        DS4SCI_WGMMA_SS(64, "bf16.bf16", 32, 33, 34, 35, 36);
    } else {
        DS4SCI_WGMMA_SS(64, "f16.f16", 32, 33, 34, 35, 36);
    }
}

// A in registers, B in shared memory. kTransposed: B's rows are contiguous along n instead of along k. kAdd as above.
#define DS4SCI_WGMMA_RS(N, FORMAT, A0, A1, A2, A3, B, TRANSPOSED, ADD)                                                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." FORMAT " " DS4SCI_REGISTERS_N##N                   \
                 ",{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "},%" #B ",%" #ADD ",1,1,%" #TRANSPOSED ";"                     \
                 : DS4SCI_ACC_N##N(d)                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "n"(kTransposed ? 1 : 0),               \
                   "n"(kAdd ? 1 : 0))
template <typename T, bool kTransposed, bool kAdd = true, int kTiles>
DS4SCI_DEVICE void wgmma_rs(float (&d)[kTiles][4], const uint32_t (&a)[4], MatrixOperand b) {
    static_assert(kTiles >= 1 && (kTiles <= 5 || kTiles == 8), "n is 8, 16, 24, 32, 40 or 64");
    if constexpr (kTiles == 1 && kIsBf16<T>) {
        DS4SCI_WGMMA_RS(8, "bf16.bf16", 4, 5, 6, 7, 8, 9, 10);
    } else if constexpr (kTiles == 1) {
        DS4SCI_WGMMA_RS(8, "f16.f16", 4, 5, 6, 7, 8, 9, 10);
    } else if constexpr (kTiles == 2 && kIsBf16<T>) {
        DS4SCI_WGMMA_RS(16, "bf16.bf16", 8, 9, 10, 11, 12, 13, 14);
    } else if constexpr (kTiles == 2) {
        DS4SCI_WGMMA_RS(16, "f16.f16", 8, 9, 10, 11, 12, 13, 14);
    } else if constexpr (kTiles == 3 && kIsBf16<T>) {
        DS4SCI_WGMMA_RS(24, "bf16.bf16", 12, 13, 14, 15, 16, 17, 18);
    } else if constexpr (kTiles == 3) {
        DS4SCI_WGMMA_RS(24, "f16.f16", 12, 13, 14, 15, 16, 17, 18);
    } else if constexpr (kTiles == 4 && kIsBf16<T>) {
        DS4SCI_WGMMA_RS(32, "bf16.bf16", 16, 17, 18, 19, 20, 21, 22);
    } else if constexpr (kTiles == 4) {
        DS4SCI_WGMMA_RS(32, "f16.f16", 16, 17, 18, 19, 20, 21, 22);
    } else if constexpr (kTiles == 5 && kIsBf16<T>) {
        DS4SCI_WGMMA_RS(40, "bf16.bf16", 20, 21, 22, 23, 24, 25, 26);
    } else if constexpr (kTiles == 5) {
        DS4SCI_WGMMA_RS(40, "f16.f16", 20, 21, 22, 23, 24, 25, 26);
    } else if constexpr (kIsBf16<T>) {
        DS4SCI_WGMMA_RS(64, "bf16.bf16", 32, 33, 34, 35, 36, 37, 38);
    } else {
        DS4SCI_WGMMA_RS(64, "f16.f16", 32, 33, 34, 35, 36, 37, 38);
    }
}

// ---- launch ----
struct LaunchShape {
    int64_t blocks;
    int threads, smem_bytes;
};

// Into the stream, to start before the kernels ahead of it are complete: it waits for them itself.
template <typename Params, typename... Arguments>
cudaError_t launch_overlapping(void (*kernel)(Params, Arguments...), const LaunchShape& shape, void* stream,
                               const Params& params, Arguments... arguments) {
    if (shape.blocks > 2147483647) return cudaErrorInvalidConfiguration;
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shape.smem_bytes);
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute attributes[1]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.smem_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, params, arguments...);
}

}  // namespace ds4sci

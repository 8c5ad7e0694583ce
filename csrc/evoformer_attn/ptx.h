// SPDX-License-Identifier: Apache-2.0
// Raw PTX for sm_80 and newer: asynchronous copies, ldmatrix, mma.sync, exp2, conversions, shuffles.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "element.h"

#define DS4SCI_DEVICE __device__ __forceinline__
#define DS4SCI_HOST_DEVICE __host__ __device__
#define DS4SCI_DYNAMIC_SMEM(name) extern __shared__ __align__(128) unsigned char name[]

namespace ds4sci {

DS4SCI_DEVICE uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- synchronisation ----
DS4SCI_DEVICE void block_sync() { __syncthreads(); }
DS4SCI_DEVICE void warp_sync() { __syncwarp(); }

// ---- asynchronous copies ----
DS4SCI_DEVICE void cp_async_16(uint32_t dst, const void* src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
DS4SCI_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DS4SCI_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- shared memory ----
DS4SCI_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DS4SCI_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
DS4SCI_DEVICE float lds_f32(uint32_t address) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}
DS4SCI_DEVICE float2 lds_f32x2(uint32_t address) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
    return x;
}
DS4SCI_DEVICE float4 lds_f32x4(uint32_t address) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}
DS4SCI_DEVICE uint4 lds_u32x4(uint32_t address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}
DS4SCI_DEVICE void sts_u32(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
DS4SCI_DEVICE void sts_zero_16(uint32_t address) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(address), "r"(0) : "memory");
}
DS4SCI_DEVICE void sts_f32x2(uint32_t address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// ---- tensor cores: d += a b, m16n8k16, fp32 accumulation ----
template <typename T>
DS4SCI_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
DS4SCI_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DS4SCI_DEVICE void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- conversions ----
DS4SCI_DEVICE float bits_to_float(uint32_t x) { return __uint_as_float(x); }
DS4SCI_DEVICE uint32_t float_to_bits(float x) { return __float_as_uint(x); }
template <typename T>
DS4SCI_DEVICE uint32_t pack2(float low, float high);
template <>
DS4SCI_DEVICE uint32_t pack2<bf16>(float low, float high) {
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
template <>
DS4SCI_DEVICE uint32_t pack2<fp16>(float low, float high) {
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
DS4SCI_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
DS4SCI_DEVICE float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DS4SCI_DEVICE float to_float(float x) { return x; }
template <typename T>
DS4SCI_DEVICE float2 unpack2(uint32_t x) {
    return make_float2(to_float(T{static_cast<uint16_t>(x)}), to_float(T{static_cast<uint16_t>(x >> 16)}));
}

// ---- arithmetic and warp exchange ----
// .ftz: without it the compiler surrounds each exponential with three instructions for denormal results.
DS4SCI_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Without the call that handles what overflows in an exact one. 0 for what is above 2^126.
DS4SCI_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// A product that the compiler may not merge into a following addition.
DS4SCI_DEVICE float multiply_rounded(float x, float y) { return __fmul_rn(x, y); }
DS4SCI_DEVICE float shfl(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DS4SCI_DEVICE float shfl_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// The same value in every lane, told to the compiler: it can then live in a uniform register.
template <typename Value>
DS4SCI_DEVICE const Value* warp_uniform(const Value* pointer) {
    const uint64_t bits = reinterpret_cast<uint64_t>(pointer);
    const uint64_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits), 0);
    const uint64_t high = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits >> 32), 0);
    return reinterpret_cast<const Value*>(high << 32 | low);
}
// The same value, of unknown origin to the compiler: what depends on it is computed again rather than kept in
// registers.
DS4SCI_DEVICE int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
DS4SCI_DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }

// ---- launch ----
template <typename Params, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Params, Arguments...), int64_t num_blocks, int num_threads,
                          int64_t smem_bytes, void* stream, const Params& params, Arguments... arguments) {
    if (num_blocks == 0) return cudaSuccess;
    // All blocks on grid.x: y and z stop at 65,535 and B * N passes that for deep MSAs.
    if (num_blocks > 2147483647) return cudaErrorInvalidConfiguration;
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(smem_bytes));
    if (status != cudaSuccess) return status;
    kernel<<<static_cast<unsigned>(num_blocks), num_threads, smem_bytes, static_cast<cudaStream_t>(stream)>>>(
        params, arguments...);
    return cudaGetLastError();
}

}  // namespace ds4sci

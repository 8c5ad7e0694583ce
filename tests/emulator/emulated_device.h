// SPDX-License-Identifier: Apache-2.0
// A CUDA device on the CPU, for tests: the kernels of csrc/evoformer_attn compiled by a C++ compiler with this header
// in place of ptx.h. Each CUDA thread is a fibre. A fibre runs until it needs the others (a block barrier or a
// warp-wide instruction), then another one is picked at random, so that a missing barrier shows as a wrong result.
// What it checks:
//   - every shared-memory access lies inside the block's allocation and is aligned;
//   - shared memory starts as NaN in every block;
//   - asynchronous copies land when they are waited for, not before (DS4SCI_EMULATE_COPIES=deferred, the default),
//     or at once (eager): a kernel that reads too early fails the first way, one that overwrites too early the second;
//   - a barrier that not all threads reach is reported instead of hanging.
// It does not model memory ordering inside a warp, registers, or time.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "element.h"

#define DS4SCI_DEVICE inline
#define DS4SCI_HOST_DEVICE inline
#define DS4SCI_DYNAMIC_SMEM(name) unsigned char* name = ds4sci::emulator::block().smem.data()
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated CUDA error"; }

struct float2 {
    float x, y;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

namespace ds4sci {
namespace emulator {

struct Index {
    uint32_t x;
};

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated device: %s\n", what);
    std::abort();
}

struct Copy {
    uint32_t dst;
    unsigned char data[16];
};

constexpr size_t kStackBytes = 256 * 1024;

struct Fibre {
    std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
    ucontext_t start;
    jmp_buf resume;
    bool started = false, done = false;
    const uint64_t* waits_for = nullptr;  // runnable once *waits_for != seen
    uint64_t seen = 0;
    std::deque<std::vector<Copy>> copies;  // committed groups, then the open one
};

// A meeting point of several fibres; the last to arrive does the work for all.
struct Rendezvous {
    std::vector<void*> arguments;
    size_t arrived = 0;
    uint64_t generation = 0;
};

struct Block {
    std::vector<unsigned char> smem;
    std::vector<Fibre> fibres;
    std::vector<Rendezvous> warps;
    Rendezvous all;
    std::function<void()> body;
    jmp_buf scheduler;
    uint32_t current = 0;
    bool deferred_copies = true;
    std::mt19937 random{12345};
};

inline Block& block() {
    static thread_local Block instance;
    return instance;
}
inline Fibre& fibre() { return block().fibres[block().current]; }

inline void yield() {
    if (_setjmp(fibre().resume) == 0) _longjmp(block().scheduler, 1);
}

template <typename Work>
void meet(Rendezvous& place, size_t index, size_t count, void* argument, const Work& work) {
    place.arguments.resize(count);
    place.arguments[index] = argument;
    if (++place.arrived == count) {
        work(place.arguments);
        place.arrived = 0;
        ++place.generation;
        return;
    }
    fibre().waits_for = &place.generation;
    fibre().seen = place.generation;
    yield();
}

// Argument is this lane's; work sees all 32.
template <typename Argument, typename Work>
void warp_collective(Argument& argument, const Work& work) {
    Block& b = block();
    const uint32_t warp = b.current / 32, lane = b.current % 32;
    meet(b.warps[warp], lane, 32, &argument, [&](const std::vector<void*>& pointers) {
        Argument* lanes[32];
        for (int i = 0; i < 32; ++i) lanes[i] = static_cast<Argument*>(pointers[i]);
        work(lanes);
    });
}

inline void fibre_main() {
    block().body();
    fibre().done = true;
    _longjmp(block().scheduler, 1);
}

inline unsigned char* smem_at(uint32_t address, uint32_t bytes) {
    Block& b = block();
    if (address % bytes != 0) fail("misaligned shared-memory access");
    if (address + static_cast<uint64_t>(bytes) > b.smem.size()) fail("shared-memory access out of bounds");
    return b.smem.data() + address;
}

void run_block(uint32_t block_index, int num_threads);

}  // namespace emulator
}  // namespace ds4sci

inline thread_local ds4sci::emulator::Index threadIdx{0}, blockIdx{0};

namespace ds4sci {
namespace emulator {

inline void run_block(uint32_t block_index, int num_threads) {
    Block& b = block();
    std::memset(b.smem.data(), 0xff, b.smem.size());
    blockIdx.x = block_index;
    for (Fibre& f : b.fibres) {
        f.started = f.done = false;
        f.waits_for = nullptr;
        f.copies.assign(1, {});
    }
    std::vector<uint32_t> ready;
    while (true) {
        ready.clear();
        bool unfinished = false;
        for (int i = 0; i < num_threads; ++i) {
            const Fibre& f = b.fibres[i];
            if (f.done) continue;
            unfinished = true;
            if (f.waits_for == nullptr || *f.waits_for != f.seen) ready.push_back(i);
        }
        if (!unfinished) break;
        if (ready.empty()) fail("threads wait at a barrier that others never reach");
        // Whole warps in random order: lanes of a warp meet all the time, so picking lanes would only cost time.
        const uint32_t warp = ready[b.random() % ready.size()] / 32;
        for (const uint32_t i : ready) {
            if (i / 32 != warp) continue;
            Fibre& f = b.fibres[i];
            b.current = i;
            threadIdx.x = i;
            f.waits_for = nullptr;
            if (_setjmp(b.scheduler) != 0) continue;
            if (f.started) _longjmp(f.resume, 1);
            f.started = true;
            getcontext(&f.start);
            f.start.uc_stack.ss_sp = f.stack.get();
            f.start.uc_stack.ss_size = kStackBytes;
            f.start.uc_link = nullptr;
            makecontext(&f.start, reinterpret_cast<void (*)()>(fibre_main), 0);
            setcontext(&f.start);
        }
    }
    if (b.all.arrived != 0) fail("a block barrier was left half reached");
}

}  // namespace emulator

inline uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulator::block().smem.data());
}

inline void block_sync() {
    emulator::Block& b = emulator::block();
    emulator::meet(b.all, b.current, b.fibres.size(), nullptr, [](const std::vector<void*>&) {});
}
inline void warp_sync() {
    int nothing = 0;
    emulator::warp_collective(nothing, [](int**) {});
}

inline void cp_async_16(uint32_t dst, const void* src) {
    if (reinterpret_cast<uintptr_t>(src) % 16 != 0) emulator::fail("misaligned cp.async source");
    emulator::smem_at(dst, 16);
    emulator::Copy copy{dst, {}};
    std::memcpy(copy.data, src, 16);
    if (emulator::block().deferred_copies) {
        emulator::fibre().copies.back().push_back(copy);
    } else {
        std::memcpy(emulator::smem_at(dst, 16), copy.data, 16);
    }
}
inline void cp_async_commit() { emulator::fibre().copies.emplace_back(); }
template <int kPending>
void cp_async_wait() {
    auto& groups = emulator::fibre().copies;
    while (static_cast<int>(groups.size()) - 1 > kPending) {
        for (const emulator::Copy& copy : groups.front()) std::memcpy(emulator::smem_at(copy.dst, 16), copy.data, 16);
        groups.pop_front();
    }
}

namespace emulator {
struct Ldmatrix {
    uint32_t address;
    uint32_t* r;
};
inline void ldmatrix(Ldmatrix** lanes, bool transpose) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t m[8][8];
        for (int row = 0; row < 8; ++row) std::memcpy(m[row], smem_at(lanes[matrix * 8 + row]->address, 16), 16);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            const uint16_t low = transpose ? m[t][g] : m[g][t], high = transpose ? m[t + 1][g] : m[g][t + 1];
            lanes[lane]->r[matrix] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}
}  // namespace emulator

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    emulator::Ldmatrix argument{address, r};
    emulator::warp_collective(argument, [](emulator::Ldmatrix** lanes) { emulator::ldmatrix(lanes, false); });
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    emulator::Ldmatrix argument{address, r};
    emulator::warp_collective(argument, [](emulator::Ldmatrix** lanes) { emulator::ldmatrix(lanes, true); });
}

template <typename Value>
Value read_smem(uint32_t address) {
    Value x;
    std::memcpy(&x, emulator::smem_at(address, sizeof(Value)), sizeof(Value));
    return x;
}
inline float lds_f32(uint32_t address) { return read_smem<float>(address); }
inline float2 lds_f32x2(uint32_t address) { return read_smem<float2>(address); }
inline float4 lds_f32x4(uint32_t address) { return read_smem<float4>(address); }
inline uint4 lds_u32x4(uint32_t address) { return read_smem<uint4>(address); }
inline void sts_u32(uint32_t address, uint32_t x) { std::memcpy(emulator::smem_at(address, 4), &x, 4); }
inline void sts_zero_16(uint32_t address) { std::memset(emulator::smem_at(address, 16), 0, 16); }
inline void sts_f32x2(uint32_t address, float x, float y) {
    const float2 value{x, y};
    std::memcpy(emulator::smem_at(address, 8), &value, 8);
}

inline float bits_to_float(uint32_t x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline uint32_t float_to_bits(float x) {
    uint32_t y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(fp16 x) {
    _Float16 y;
    std::memcpy(&y, &x.bits, 2);
    return static_cast<float>(y);
}
inline float to_float(float x) { return x; }
template <typename T>
float2 unpack2(uint32_t x) {
    return {to_float(T{static_cast<uint16_t>(x)}), to_float(T{static_cast<uint16_t>(x >> 16)})};
}

namespace emulator {
inline uint16_t round_to(bf16, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t round_to(fp16, float x) {
    const _Float16 y = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &y, 2);
    return bits;
}
}  // namespace emulator
template <typename T>
uint32_t pack2(float low, float high) {
    return emulator::round_to(T{}, low) | static_cast<uint32_t>(emulator::round_to(T{}, high)) << 16;
}

namespace emulator {
struct Mma {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};
}  // namespace emulator
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Mma argument{d, a, {b0, b1}};
    emulator::warp_collective(argument, [](emulator::Mma** lanes) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            for (int part = 0; part < 4; ++part) {
                const float2 value = unpack2<T>(lanes[lane]->a[part]);
                left[g + part % 2 * 8][t + part / 2 * 8] = value.x;
                left[g + part % 2 * 8][t + part / 2 * 8 + 1] = value.y;
            }
            for (int part = 0; part < 2; ++part) {
                const float2 value = unpack2<T>(lanes[lane]->b[part]);
                right[t + part * 8][g] = value.x;
                right[t + part * 8 + 1][g] = value.y;
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int e = 0; e < 4; ++e) {
                const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
                float sum = lanes[lane]->d[e];
                for (int i = 0; i < 16; ++i) sum += left[row][i] * right[i][column];
                lanes[lane]->d[e] = sum;
            }
        }
    });
}

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < FLT_MIN ? 0.f : y;  // .ftz; NaN stays
}

inline float reciprocal_approx(float x) { return 1.f / x; }

namespace emulator {
struct Shuffle {
    float in, out;
    int source;
};
inline float shuffle(float x, int source) {
    Shuffle argument{x, 0.f, source};
    warp_collective(argument, [](Shuffle** lanes) {
        for (int i = 0; i < 32; ++i) lanes[i]->out = lanes[lanes[i]->source]->in;
    });
    return argument.out;
}
}  // namespace emulator
inline float shfl(float x, int lane) { return emulator::shuffle(x, lane); }
inline float shfl_xor(float x, int mask) { return emulator::shuffle(x, static_cast<int>(threadIdx.x % 32) ^ mask); }
template <typename Value>
const Value* warp_uniform(const Value* pointer) {
    struct Argument {
        const Value* pointer;
    } argument{pointer};
    emulator::warp_collective(argument, [](Argument** lanes) {
        for (int i = 0; i < 32; ++i) {
            if (lanes[i]->pointer != lanes[0]->pointer) emulator::fail("warp_uniform of different values");
        }
    });
    return pointer;
}
inline float multiply_rounded(float x, float y) { return x * y; }  // compiled without contraction
inline int opaque(int x) { return x; }
inline bool warp_any(bool x) {
    bool argument = x;
    emulator::warp_collective(argument, [](bool** lanes) {
        bool any = false;
        for (int i = 0; i < 32; ++i) any = any || *lanes[i];
        for (int i = 0; i < 32; ++i) *lanes[i] = any;
    });
    return argument;
}

template <typename Params>
cudaError_t launch_kernel(void (*kernel)(Params), int64_t num_blocks, int num_threads, int64_t smem_bytes, void*,
                          const Params& params) {
    if (num_blocks > 2147483647) return cudaErrorInvalidConfiguration;
    emulator::Block& b = emulator::block();
    const char* copies = std::getenv("DS4SCI_EMULATE_COPIES");
    b.deferred_copies = copies == nullptr || std::strcmp(copies, "eager") != 0;
    b.smem.resize(smem_bytes);
    if (b.fibres.size() < static_cast<size_t>(num_threads)) b.fibres = std::vector<emulator::Fibre>(num_threads);
    b.fibres.resize(num_threads);
    b.warps.assign(num_threads / 32, {});
    b.all = {};
    b.body = [&] { kernel(params); };
    for (int64_t i = 0; i < num_blocks; ++i) emulator::run_block(static_cast<uint32_t>(i), num_threads);
    return cudaSuccess;
}

}  // namespace ds4sci

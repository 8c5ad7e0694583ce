// SPDX-License-Identifier: Apache-2.0
//
// Stand-in for the part of torch's C++ interface that DeepSpeed's two Evoformer launch files use.
//
// It lets those files compile unchanged from the installed package into a library that links no torch, so that one
// build serves every torch version. Only dense tensors occur: DeepSpeed's Python wrapper makes its inputs contiguous.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#define TORCH_CHECK(condition, ...)                                                                                   \
    if (!(condition)) {                                                                                               \
        throw std::runtime_error(#condition " does not hold");                                                        \
    }

namespace at {
enum class ScalarType : int { Half = 0, BFloat16 = 1, Float = 2 };
struct Half {};
struct BFloat16 {};
}  // namespace at

namespace torch {

constexpr int kMaxDims = 5;

// Same layout as `_Tensor` in tests/benchmarks/peers/deepspeed.py.
struct Tensor {
    void* data;
    int64_t dims;
    int64_t sizes[kMaxDims];
    int64_t strides[kMaxDims];  // elements
    int64_t dtype;              // at::ScalarType

    int64_t size(int64_t axis) const { return sizes[axis < 0 ? axis + dims : axis]; }
    int64_t stride(int64_t axis) const { return strides[axis < 0 ? axis + dims : axis]; }
    at::ScalarType scalar_type() const { return static_cast<at::ScalarType>(dtype); }
    at::ScalarType options() const { return scalar_type(); }

    template <typename T>
    T* data_ptr() const {
        return static_cast<T*>(data);
    }

    Tensor view(std::initializer_list<int64_t> shape) const {
        int64_t elements = 1;
        for (int64_t axis = dims - 1; axis >= 0; --axis) {
            if (sizes[axis] != 1 && strides[axis] != elements) {
                throw std::runtime_error("a tensor handed to DeepSpeed's op is not contiguous");
            }
            elements *= sizes[axis];
        }
        Tensor out{data, static_cast<int64_t>(shape.size()), {}, {}, dtype};
        int64_t known = 1;
        for (int64_t extent : shape) {
            known *= extent > 0 ? extent : 1;
        }
        int64_t axis = 0;
        for (int64_t extent : shape) {
            out.sizes[axis++] = extent > 0 ? extent : elements / known;
        }
        int64_t stride = 1;
        for (axis = out.dims - 1; axis >= 0; --axis) {
            out.strides[axis] = stride;
            stride *= out.sizes[axis];
        }
        return out;
    }
};

// Device memory comes from the caller, so that the framework's allocator owns and counts it.
inline void* (*&allocate())(int64_t bytes) {
    static void* (*function)(int64_t) = nullptr;
    return function;
}

inline Tensor empty(int64_t elements, at::ScalarType dtype) {
    void* data = elements > 0 ? allocate()(elements * (dtype == at::ScalarType::Float ? 4 : 2)) : nullptr;
    return Tensor{data, 1, {elements}, {1}, static_cast<int64_t>(dtype)};
}

}  // namespace torch

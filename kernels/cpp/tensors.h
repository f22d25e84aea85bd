// Tensors, and the types of numbers the ops take.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/util/OptionalArrayRef.h>

#include <cstdint>
#include <limits>
#include <optional>

// Calls a lambda in which `scalar_t` is the type of the numbers of x
#define DISPATCH(x, name, ...)                                                   \
  AT_DISPATCH_SWITCH((x).scalar_type(), name,                                    \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE( \
                         at::kBFloat16, __VA_ARGS__) AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Layouts = at::OptionalIntArrayRef;  // of the rows of a cache, if it is packed

// For more tokens than these, PyTorch's own products of x are as fast. Its products of numbers of
// 16 bits never are where the processor has no instruction for them.
inline int64_t few_rows(const Tensor& x) {
#ifdef CPU_CAPABILITY_AVX2
  return x.element_size() == 2 ? std::numeric_limits<int64_t>::max() : 32;
#else
  return 8;
#endif
}

}  // namespace

// Tensors, and the types of numbers the ops take.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/util/OptionalArrayRef.h>

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

constexpr int64_t FEW_ROWS = 8;  // for more tokens, PyTorch's own products are as fast

}  // namespace

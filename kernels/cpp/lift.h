// Latents back to keys, by PyTorch's own matrix product for one core, which uses AMX.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstdint>
#include <type_traits>

#include "tensors.h"

namespace {

// Calls use(L()) for the type in which one core multiplies matrices of T fastest: bf16 where the
// processor multiplies tiles of bf16 (AMX), otherwise fp32. `size` is the length of the sums.
template <class T, class Use>
Tensor with_lift_type(int64_t size, const Use& use) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (size % 2 == 0 && at::native::cpublas::could_pack(at::kBFloat16)) return use(at::BFloat16());
  return use(float());
}

// Matrices (n, size, width) as `lift` reads them: in bf16, two rows are interleaved
template <class L>
Tensor pack_for_lift(const Tensor& maps) {
  Tensor x = maps.to(c10::CppTypeToScalarType<L>::value);
  if (std::is_same_v<L, at::BFloat16>) x = x.unflatten(1, {-1, 2}).transpose(2, 3);
  return x.contiguous();
}

// out (rows, width) = a (rows, size) times a matrix of `pack_for_lift`
template <class L>
void lift(const L* a, int64_t rows, int64_t lda, const L* map, int64_t size, int64_t width,
          float* out, int64_t ldo) {
  at::native::cpublas::brgemm(rows, width, size, lda, width, ldo, false, a, map, out,
                              std::is_same_v<L, at::BFloat16>);
}

}  // namespace

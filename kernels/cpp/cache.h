// The keys or values of a cache: numbers, or codes with one scale per slot and latent.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "lanes.h"
#include "packed.h"
#include "tensors.h"
#include "vectors.h"

namespace {

struct Cache {
  const Tensor& x;              // (B, L, S, R), the last dimension contiguous
  const OptionalTensor& scale;  // (B, L, S, 1) in bf16, for codes

  bool four_bits() const { return x.scalar_type() == at::kByte; }
  int64_t width() const { return x.size(3) * (four_bits() ? 2 : 1); }

  template <class T>
  at::ScalarType factor() const {  // the dtype of what it is multiplied with, in a model of T
    return scale ? at::kFloat : c10::CppTypeToScalarType<Factor<T>>::value;
  }

  template <class T>
  const T* at(int64_t b, int64_t l, int64_t t) const {
    const T* p;
    if constexpr (std::is_same_v<T, Nibbles>)
      p = reinterpret_cast<const T*>(x.const_data_ptr<uint8_t>());
    else
      p = x.const_data_ptr<T>();  // raises an error where the dtype differs
    return p + b * x.stride(0) + l * x.stride(1) + t * x.stride(2);
  }

  // Calls use(rows) with a pointer to slot t of latent l
  template <class T, class Use>
  void with_rows(int64_t b, int64_t l, int64_t t, const Use& use) const {
    if (!scale)
      use(at<T>(b, l, t));
    else if (four_bits())
      use(at<Nibbles>(b, l, t));
    else
      use(at<int8_t>(b, l, t));
  }

  // Multiplies s (rows, n) by the scales of n slots from t on. Applied to scores or to weights, a
  // scale costs one product per slot and row instead of one per number of the cache.
  void apply_scales(float* s, int64_t rows, int64_t ld, int64_t b, int64_t l, int64_t t,
                    int64_t n) const {
    if (!scale) return;
    const int64_t step = scale->stride(2);
    const auto* p = scale->const_data_ptr<at::BFloat16>() + b * scale->stride(0) +
                    l * scale->stride(1) + t * step;
    at::BFloat16 adjacent[W] = {};
    for (int64_t i = 0; i < n; i += W) {
      const int64_t count = std::min(W, n - i);
      for (int64_t j = 0; j < count; ++j) adjacent[j] = p[(i + j) * step];
      const V x = load(adjacent);
      for (int64_t r = 0; r < rows; ++r)
        (load(s + r * ld + i, count) * x).store(s + r * ld + i, count);
    }
  }
};

}  // namespace

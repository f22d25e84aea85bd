// The keys or values of a cache: numbers, or rows of codes.
#pragma once

#include <ATen/ops/empty.h>

#include <cstdint>
#include <vector>

#include "lanes.h"
#include "packed.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// Rows of numbers of one latent, from a slot on
template <class T>
struct Numbers {
  using Factor = ::Factor<T>;

  const T* x;
  int64_t step, width;  // numbers from a slot to the next, and of a slot

  int64_t vectors() const { return round_up(width) / W; }
  Numbers skip(int64_t slots) const { return {x + slots * step, step, width}; }

  // What queries of `width` numbers become: factors() of them
  int64_t factors() const { return width; }
  void make_factors(const float* query, Factor* y) const { at::vec::convert(query, y, width); }
};

struct Cache {
  const Tensor& x;  // (B, L, S, R), the last dimension contiguous; or rows (B, S, bytes)
  const bool packed;
  const Packing packing;

  Cache(const Tensor& x, const Layouts& layout)
      : x(x), packed(layout.has_value()), packing(layout ? Packing(*layout) : Packing()) {}

  // Only of a cache that was checked
  int64_t latents() const { return packed ? packing.heads : x.size(1); }
  int64_t slots() const { return x.size(packed ? 1 : 2); }
  int64_t width() const { return packed ? packing.width : x.size(3); }
  int64_t padded() const { return packed ? packing.vectors * W : round_up(x.size(3)); }

  // The rows of latent l from slot t on, if they are packed
  Codes codes(int64_t b, int64_t l, int64_t t) const {
    const uint8_t* row = x.const_data_ptr<uint8_t>() + b * x.stride(0) + t * x.stride(1);
    const uint8_t* scales = row + packing.heads * packing.code_bytes + l * packing.scales;
    return {&packing, row + l * packing.code_bytes, scales, x.stride(1)};
  }

  // Calls use(rows) with them, or with numbers, in a model of T
  template <class T, class Use>
  void with_rows(int64_t b, int64_t l, int64_t t, const Use& use) const {
    if (packed) return use(codes(b, l, t));
    const T* p = x.const_data_ptr<T>();  // raises an error where the dtype differs
    p += b * x.stride(0) + l * x.stride(1) + t * x.stride(2);
    use(Numbers<T>{p, x.stride(2), x.size(3)});
  }

  // What rows are multiplied with, a (..., R), as they need it in a model of T: (..., R), or in the
  // order of codes, with zeros where they have none
  template <class T>
  Tensor factors(const Tensor& a) const {
    if (!packed) return a.to(c10::CppTypeToScalarType<Factor<T>>::value).contiguous();
    const Tensor given = a.to(at::kFloat).contiguous();
    std::vector<int64_t> shape = a.sizes().vec();
    shape.back() = padded();
    Tensor out = at::empty(shape, given.options());
    const float* from = given.const_data_ptr<float>();
    float* to = out.data_ptr<float>();
    const Codes codes{&packing, nullptr, nullptr, 0};
    for (int64_t i = 0; i < given.numel(); i += width(), to += padded())
      codes.make_factors(from + i, to);
    return out;
  }
};

}  // namespace

// Vectors as rows of codes: `pack` in zoo/models/packing.py.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "checks.h"
#include "packing.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// How numbers become codes of fewer than 8 bits: code n stands for n - `level` scales
struct Levels {
  float level, half, most;
  float step;  // in standard deviations, the one that loses least of normal numbers

  explicit Levels(int64_t bits)
      : level(float(1 << bits) / 2 - 0.5f),
        half(float(1 << bits) / 2),
        most(float(1 << bits) - 1),
        step(bits == 4 ? 0.335f : bits == 3 ? 0.586f : 0.996f) {}

  // In fp32, 0 for NaN
  V code(V x, V scale) const {
    const V n = (x / scale + V(half)).floor();
    return V::blendv(V(0.f), at::vec::minimum(n, V(most)), n > V(0.f));
  }
};

// The code of the nearest scale, or, with `more` just below a code, of the next one above
inline int32_t code_of(float scale, int32_t more = 1 << 19) {
  int32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  return std::clamp((bits - (107 << 23) + more) >> 20, 0, 255);
}

inline int32_t best_scale(const float* x, int64_t width, int64_t bits) {
  constexpr int TRIED = 8;
  static_assert(TRIED <= W);
  float largest = 0, squares = 0;
#pragma omp simd reduction(max : largest) reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) {
    largest = std::max(largest, std::abs(x[i]));
    squares += x[i] * x[i];
  }
  const Levels levels(bits);
  const int32_t holding = code_of(largest / (bits == 8 ? 127.f : levels.level), (1 << 20) - 1);
  if (bits == 8) return holding;
  const int32_t usual = code_of(std::sqrt(squares / float(width)) * levels.step);
  int32_t tried[TRIED] = {holding};
  V scales[TRIED], sums[W];
  for (int n = 1; n < TRIED; ++n) tried[n] = std::clamp(usual + n - 3, 0, 255);
  for (int n = 0; n < TRIED; ++n) scales[n] = V(scale_of(uint8_t(tried[n])));
  for (auto& sum : sums) sum = V(0.f);
  for (int64_t i = 0; i < width; i += W) {
    const int64_t count = std::min(W, width - i);
    const V y = load(x + i, count);
    for (int n = 0; n < TRIED; ++n) {
      const V off = (levels.code(y, scales[n]) - V(levels.level)) * scales[n] - y;
      sums[n] = sums[n] + V::set(V(0.f), off * off, count);
    }
  }
  float errors[W];
  horizontal_sums(sums).store(errors);
  int best = 0;
  for (int n = 1; n < TRIED; ++n)
    if (errors[n] < errors[best]) best = n;
  return tried[best];
}

// Equal parts of codes, `bits` bits of each from bit `low` on, in bits of their own of the same bytes
inline void join(const uint8_t* codes, int64_t width, int64_t bits, int64_t low, uint8_t* out) {
  const int64_t parts = 8 / bits, bytes = width / parts;
  const uint8_t mask = uint8_t((1 << bits) - 1);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < bytes; ++i)
      out[i] |= uint8_t((codes[part * bytes + i] >> low & mask) << part * bits);
}

// codes[i] = the byte of number `of(x[i])`
template <class Of>
void for_each_code(const float* x, int64_t width, uint8_t* codes, const Of& of) {
  for (int64_t i = 0; i < width; i += W) {
    float numbers[W];
    const int64_t count = std::min(W, width - i);
    of(load(x + i, count)).store(numbers);
    for (int64_t j = 0; j < count; ++j) codes[i + j] = uint8_t(int32_t(numbers[j]));
  }
}

// A segment of a vector as codes, in bytes that are 0 before; its scale, if it has one, is returned
inline uint8_t pack_segment(const float* x, const Segment& s, uint8_t* codes, uint8_t* out) {
  if (s.bits == 16) {
    for (int64_t i = 0; i < s.width; ++i) {
      const uint16_t whole = c10::BFloat16(x[i]).x;
      out[2 * i] = uint8_t(whole);
      out[2 * i + 1] = uint8_t(whole >> 8);
    }
    return 0;
  }
  const uint8_t kept = uint8_t(best_scale(x, s.width, s.bits));
  const float scale = scale_of(kept);
  if (s.bits == 8) {
    for_each_code(x, s.width, out, [&](V y) {
      const V n = (y / V(scale)).round();
      return V::blendv(V(-127.f), at::vec::minimum(n, V(127.f)), n > V(-127.f));
    });
    return kept;
  }
  const Levels levels(s.bits);
  for_each_code(x, s.width, codes, [&](V y) { return levels.code(y, V(scale)); });
  join(codes, s.width, s.bits == 3 ? 2 : s.bits, 0, out);
  if (s.bits == 3) join(codes, s.width, 1, 2, out + s.width / 4);
  return kept;
}

// x (B, heads, T, width) -> rows (B, T, bytes)
Tensor pack(const Tensor& given, at::IntArrayRef layout) {
  const Packing packing(layout);
  check_dense("vectors (B, heads, T, width)", given, 4);
  expect(given.size(1) == packing.heads && given.size(3) == packing.width &&
             given.is_floating_point(),
         "vectors (B, heads, T, width) for this layout", given);
  const Tensor narrow = given.scalar_type() == at::kDouble ? given.to(at::kFloat) : given;
  const Tensor x = narrow.stride(3) == 1 ? narrow : narrow.contiguous();
  const int64_t tokens = x.size(2), bytes = (packing.nbytes() + 7) / 8 * 8;
  Tensor out = at::empty({x.size(0), tokens, bytes}, x.options().dtype(at::kByte));
  uint8_t* to = out.data_ptr<uint8_t>();
  DISPATCH(x, "pack", [&] {
    const scalar_t* from = x.const_data_ptr<scalar_t>();
    at::parallel_for(0, x.size(0) * tokens, 16, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> codes(packing.width);
      std::vector<float> numbers(packing.width);
      for (int64_t n = begin; n < end; ++n) {
        uint8_t* row = to + n * bytes;
        uint8_t* scale = row + packing.heads * packing.code_bytes;
        std::memset(row, 0, bytes);
        for (int64_t head = 0; head < packing.heads; ++head, row += packing.code_bytes) {
          at::vec::convert(from + n / tokens * x.stride(0) + head * x.stride(1) +
                               n % tokens * x.stride(2),
                           numbers.data(), packing.width);
          const float* vector = numbers.data();
          for (const Segment& s : packing.segments) {
            const uint8_t kept = pack_segment(vector, s, codes.data(), row + s.offset);
            if (s.bits < 16) *scale++ = kept;
            vector += s.width;
          }
        }
      }
    });
  });
  return out;
}

}  // namespace

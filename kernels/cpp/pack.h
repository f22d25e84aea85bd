// Vectors as rows of codes: `pack` in zoo/models/packing.py.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "checks.h"
#include "packing.h"
#include "tensors.h"

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

  float code(float x, float scale) const {
    const float n = std::floor(x / scale + half);
    return n > 0 ? std::min(n, most) : 0.f;
  }

  float error(const float* x, int64_t width, float scale) const {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
      const float off = (code(x[i], scale) - level) * scale - x[i];
      sum += off * off;
    }
    return sum;
  }
};

// The code of the nearest scale, or, with `more` just below a code, of the next one above
inline int32_t code_of(float scale, int32_t more = 1 << 19) {
  int32_t bits;
  std::memcpy(&bits, &scale, sizeof bits);
  return std::clamp((bits - (107 << 23) + more) >> 20, 0, 255);
}

inline int32_t best_scale(const float* x, int64_t width, int64_t bits) {
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
  int32_t best = holding;
  float least = levels.error(x, width, scale_of(uint8_t(holding)));
  for (int32_t more = -2; more < 5; ++more) {
    const int32_t tried = std::clamp(usual + more, 0, 255);
    const float error = levels.error(x, width, scale_of(uint8_t(tried)));
    if (error < least) best = tried, least = error;
  }
  return best;
}

// Equal parts of codes, `bits` bits of each from bit `low` on, in bits of their own of the same bytes
inline void join(const uint8_t* codes, int64_t width, int64_t bits, int64_t low, uint8_t* out) {
  const int64_t parts = 8 / bits, bytes = width / parts;
  const uint8_t mask = uint8_t((1 << bits) - 1);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = 0; i < bytes; ++i)
      out[i] |= uint8_t((codes[part * bytes + i] >> low & mask) << part * bits);
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
    for (int64_t i = 0; i < s.width; ++i) {
      const float n = std::nearbyint(x[i] / scale);
      out[i] = uint8_t(int8_t(n > -127 ? std::min(n, 127.f) : -127.f));
    }
    return kept;
  }
  const Levels levels(s.bits);
  for (int64_t i = 0; i < s.width; ++i) codes[i] = uint8_t(levels.code(x[i], scale));
  join(codes, s.width, s.bits == 3 ? 2 : s.bits, 0, out);
  if (s.bits == 3) join(codes, s.width, 1, 2, out + s.width / 4);
  return kept;
}

// x (B, heads, T, width) -> rows (B, T, bytes)
Tensor pack(const Tensor& x, at::IntArrayRef layout) {
  const Packing packing(layout);
  check_dense("vectors (B, heads, T, width)", x, 4);
  expect(x.size(1) == packing.heads && x.size(3) == packing.width && x.is_floating_point(),
         "vectors (B, heads, T, width) for this layout", x);
  const Tensor numbers = x.transpose(1, 2).to(at::kFloat).contiguous();
  const int64_t rows = x.size(0) * x.size(2), bytes = (packing.nbytes() + 7) / 8 * 8;
  Tensor out = at::zeros({x.size(0), x.size(2), bytes}, x.options().dtype(at::kByte));
  const float* from = numbers.const_data_ptr<float>();
  uint8_t* to = out.data_ptr<uint8_t>();
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> codes(packing.width);
    for (int64_t at = begin * packing.heads; at < end * packing.heads; ++at) {
      const int64_t head = at % packing.heads;
      uint8_t* row = to + at / packing.heads * bytes;
      uint8_t* scale = row + packing.heads * packing.code_bytes + head * packing.scales;
      const float* vector = from + at * packing.width;
      for (const Segment& s : packing.segments) {
        const uint8_t kept =
            pack_segment(vector, s, codes.data(), row + head * packing.code_bytes + s.offset);
        if (s.bits < 16) *scale++ = kept;
        vector += s.width;
      }
    }
  });
  return out;
}

}  // namespace

// What a row of codes holds, and where: see packed.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

struct Segment {
  int64_t bits, width;
  int64_t offset;      // of its codes, in bytes from the first of the latent
  int64_t first, end;  // its vectors, of those of the latent

  // How many numbers share a byte; with 3 bits, of their high bits
  int64_t sharing() const { return bits == 4 ? 2 : bits == 3 ? 8 : bits == 2 ? 4 : 1; }
};

// What a row holds. Everything is 0 for what is not packed.
struct Packing {
  int64_t heads = 0, width = 0;         // latents of a row, and numbers of a latent
  int64_t code_bytes = 0, scales = 0;   // of a latent
  int64_t vectors = 0;                  // of a latent that is unpacked
  std::vector<Segment> segments;
  std::vector<int64_t> columns;  // where each number is in these vectors

  Packing() = default;

  // layout: heads, then width and bits of every segment
  explicit Packing(at::IntArrayRef layout) {
    constexpr int64_t MOST = 1 << 16;  // so that no product or sum of codes overflows
    TORCH_CHECK(layout.size() >= 3 && layout.size() % 2 == 1 && 0 < layout[0] && layout[0] < MOST,
                "expected a layout of heads, and of width and bits of every segment, got ", layout);
    heads = layout[0];
    for (size_t i = 1; i < layout.size(); i += 2) {
      Segment s{layout[i + 1], layout[i], code_bytes, vectors, 0};
      const bool known = s.bits == 16 || s.bits == 8 || (2 <= s.bits && s.bits <= 4);
      TORCH_CHECK(known && 0 < s.width && s.width < MOST && s.width % s.sharing() == 0,
                  "expected segments of 16, 8, 4, 3 or 2 bits that fill whole bytes, got ", layout);
      for (int64_t part = 0; part < s.sharing(); ++part)  // numbers of a byte are `apart`
        for (int64_t j = 0, apart = s.width / s.sharing(); j < apart; ++j)
          columns.push_back(vectors * W + j * s.sharing() + part);
      width += s.width;
      code_bytes += s.width * s.bits / 8;
      scales += s.bits < 16;
      vectors = s.end = s.first + round_up(s.width) / W;
      segments.push_back(s);
    }
  }

  // The least bytes of a row
  int64_t nbytes() const { return heads * (code_bytes + scales); }
};

inline float scale_of(uint8_t code) {
  const uint32_t bits = (uint32_t(code) << 20) + (107u << 23);
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return scale;
}

}  // namespace

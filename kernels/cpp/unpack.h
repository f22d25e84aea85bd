// Rows of codes as numbers: `unpack` in zoo/models/packing.py.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "checks.h"
#include "packed.h"
#include "packing.h"
#include "tensors.h"

namespace {

// The numbers of a segment from its bytes p, in fp32
template <int BITS>
void unpack_segment(const uint8_t* p, int64_t width, float scale, float* y) {
  if constexpr (BITS == 16) {
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t bits = uint32_t(p[2 * i]) << 16 | uint32_t(p[2 * i + 1]) << 24;
      std::memcpy(y + i, &bits, sizeof bits);
    }
  } else if constexpr (BITS == 8) {
    for (int64_t i = 0; i < width; ++i) y[i] = float(int8_t(p[i])) * scale;
  } else {
    constexpr int LOW = BITS == 3 ? 2 : BITS;  // bits beside one another in a byte
    constexpr float LEVEL = ((1 << BITS) - 1) / 2.f;
    const int64_t bytes = width * LOW / 8, eighth = width / 8;
    for (int part = 0; part < 8 / LOW; ++part)
      for (int64_t i = 0; i < bytes; ++i) {
        const int code = p[i] >> part * LOW & ((1 << LOW) - 1);
        y[part * bytes + i] = BITS == 3 ? float(code) : (float(code) - LEVEL) * scale;
      }
    if constexpr (BITS == 3)
      for (int part = 0; part < 8; ++part)
        for (int64_t i = 0; i < eighth; ++i) {
          float& number = y[part * eighth + i];
          number = (number + float((p[bytes + i] >> part & 1) * 4) - LEVEL) * scale;
        }
  }
}

// rows (B, S, bytes) -> (B, heads, S, width)
Tensor unpack_rows(const Tensor& rows, at::IntArrayRef layout, at::ScalarType dtype) {
  const Packing packing(layout);
  expect(rows.dim() == 3 && rows.scalar_type() == at::kByte && rows.stride(2) == 1 &&
             rows.size(2) >= packing.nbytes(),
         "rows (B, S, bytes) of bytes for this layout", rows);
  const int64_t slots = rows.size(1), heads = packing.heads, width = packing.width;
  Tensor out = at::empty({rows.size(0), heads, slots, width}, rows.options().dtype(dtype));
  const uint8_t* from = rows.const_data_ptr<uint8_t>();
  DISPATCH(out, "unpack", [&] {
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, rows.size(0) * slots, 16, [&](int64_t begin, int64_t end) {
      std::vector<float> numbers(width);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t b = n / slots, t = n % slots;
        const uint8_t* row = from + b * rows.stride(0) + t * rows.stride(1);
        const uint8_t* scale = row + heads * packing.code_bytes;
        for (int64_t head = 0; head < heads; ++head, row += packing.code_bytes) {
          float* y = numbers.data();
          for (const Segment& s : packing.segments) {
            const float own = s.bits == 16 ? 1.f : scale_of(*scale++);
            with_bits(s.bits, [&](auto bits) {
              unpack_segment<decltype(bits)::value>(row + s.offset, s.width, own, y);
            });
            y += s.width;
          }
          at::vec::convert(numbers.data(), to + ((b * heads + head) * slots + t) * width, width);
        }
      }
    });
  });
  return out;
}

}  // namespace

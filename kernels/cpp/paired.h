// Rows of codes in models of bf16, where the processor multiplies pairs of bf16: the codes of two
// slots are unpacked to bf16, which keeps them exactly, side by side. Their scales are part of the
// weights that they are multiplied with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "packed.h"
#include "splits.h"
#include "vectors.h"
#include "weighted_sum.h"

#ifdef __AVX512BF16__
namespace {

// One segment of rows of codes
struct PairedCodes {
  using Factor = at::BFloat16;

  const Codes* rows;
  const Segment* segment;

  int64_t vectors() const { return segment->end - segment->first; }
};

// The numbers of two slots, which lie in the higher halves of their lanes
inline __m512i pair(__m512i first, __m512i second) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
}

// W numbers of two slots from number n on, of which `count` exist, without their scales. p, q: the
// bytes of their segments
template <int BITS>
C10_ALWAYS_INLINE __m512i paired_numbers(const uint8_t* p, const uint8_t* q, int64_t n,
                                         int64_t width, int64_t count) {
  if constexpr (BITS >= 8) {
    const V a = numbers<BITS>(p, n, width, count), b = numbers<BITS>(q, n, width, count);
    return pair(_mm512_castps_si512(a), _mm512_castps_si512(b));
  } else {
    static constexpr EachLane<float> levels(
        [](int lane) { return lane % (1 << BITS) - ((1 << BITS) - 1) / 2.f; });
    // read at the lowest five bits of a half lane: those above the code do not matter
    const __m512i table =
        _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(levels.x)));
    const __m512i a = low_codes<BITS>(p, n, width, count), b = low_codes<BITS>(q, n, width, count);
    const __m512i codes = _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
    return _mm512_permutexvar_epi16(codes, table);
  }
}

// The vectors of a segment from `begin` to `end`
struct PairedColumns {
  using L = Lanes<at::BFloat16, at::BFloat16>;
  static constexpr bool IN_PLACE = false;

  const PairedCodes& v;
  int64_t begin, end;

  // Writes those of slots `from` up to `to` to y
  void read(int64_t from, int64_t to, __m512i* y) const {
    const Segment& s = *v.segment;
    auto unpack = [&](auto bits) {
      for (int64_t t = from; t < to; t += 2) {
        const uint8_t *p = v.rows->codes + t * v.rows->step + s.offset, *q = p + v.rows->step;
        if (t + 1 == to) q = p;  // its weight is zero
        if (s.first + begin == 0)  // for all segments, with scales, which the next tile reads first
          for (int64_t k = 0; k < 2; ++k) v.rows->fetch(t + k + TILE);
        const int64_t whole = std::min(end, s.width / W);
        for (int64_t i = begin; i < whole; ++i)
          *y++ = paired_numbers<decltype(bits)::value>(p, q, i * W, s.width, W);
        if (whole < end)
          *y++ = paired_numbers<decltype(bits)::value>(p, q, whole * W, s.width, s.width % W);
      }
    };
    with_bits(s.bits, unpack);
  }
};
inline PairedColumns columns(const PairedCodes& v, int64_t begin, int64_t end) {
  return {v, begin, end};
}

// out = keep * out + p v as `weighted_sum` computes it, for slots <= TILE. Products of p (rows,
// TILE) and scales are rounded to bf16. narrow: memory for these
inline void paired_sum(const float* p, int64_t rows, const Codes& v, int64_t slots,
                       const float* keep, float* out, int64_t ldo,
                       std::vector<at::BFloat16>& narrow) {
  alignas(64) float scales[TILE];
  const uint8_t* scale = v.scales;
  for (const Segment& s : v.packing->segments) {
    if (s.bits < 16) {
      for (int64_t t = 0; t < slots; ++t) scales[t] = scale_of(scale[t * v.step]);
      ++scale;
    } else {
      std::fill_n(scales, slots, 1.f);
    }
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t t = 0; t < slots; t += 2 * W) {
        auto product = [&](int64_t i) { return load(p + m * TILE + i) * load(scales + i); };
        const __m512bh both = _mm512_cvtne2ps_pbh(product(t + W), product(t));
        _mm512_storeu_si512(&narrow[m * TILE + t], (__m512i)both);
      }
    const PairedCodes codes{&v, &s};
    weighted_sum(narrow.data(), rows, TILE, codes, slots, keep, out + s.first * W, ldo);
  }
}

}  // namespace
#endif

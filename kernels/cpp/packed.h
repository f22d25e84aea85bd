// Rows of codes, as zoo/models/packing.py defines them: up to a few segments of falling bits, with
// a scale each. Here they are unpacked in registers, to fp32. In models of bf16 some processors
// have faster ways: see rounded.h for keys, and weighted_bytes.h for values.
//
// Numbers are unpacked in an order of their own, in which those that share a byte follow one
// another: then vectors are full however narrow a segment is, and no lane needs a byte of another.
// Queries are brought into this order and results back from it, once per call: see `columns`.
#pragma once

#include <c10/macros/Macros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "packing.h"
#include "vectors.h"

namespace {

// The level of number n of a segment's order, for 4, 3 and 2 bits
template <int BITS>
float level(const uint8_t* p, uint64_t n, int64_t width) {
  if constexpr (BITS == 3) {
    const uint64_t i = n / 8, eighth = n % 8;
    const int low = p[eighth % 2 * (width / 8) + i] >> eighth / 2 * 2 & 3;
    const int high = p[width / 4 + i] >> eighth & 1;
    return float(low | high << 2) - 3.5f;
  } else {
    constexpr uint64_t PARTS = 8 / BITS, MASK = (1 << BITS) - 1;
    return float(p[n / PARTS] >> n % PARTS * BITS & MASK) - MASK / 2.f;
  }
}

// Up to 4 bytes as one number, the first in its lowest bits
inline int word(const uint8_t* p, int64_t count) {
  uint32_t x = 0;
  for (int64_t i = 0; i < count; ++i) x |= uint32_t(p[i]) << 8 * i;
  return int(x);
}
template <int BYTES>
int word(const uint8_t* p) {
  std::conditional_t<BYTES == 1, uint8_t, std::conditional_t<BYTES == 2, uint16_t, uint32_t>> x;
  std::memcpy(&x, p, BYTES);
  return int(x);
}

// W levels from number n on of a segment's order, of which `count` exist. Others are anything
// finite, and no byte of theirs is read.
#ifdef CPU_CAPABILITY_AVX512
template <class T>
struct alignas(64) EachLane {
  T x[W];

  template <class Of>
  constexpr explicit EachLane(Of of) : x() {
    for (int lane = 0; lane < W; ++lane) x[lane] = of(lane);
  }
};

// Codes, in the lowest bits of every lane. Those above may be anything.
template <int BITS>
C10_ALWAYS_INLINE __m512i low_codes(const uint8_t* p, uint64_t n, int64_t width, int64_t count) {
  if constexpr (BITS == 4) {
    static constexpr EachLane<int> shift([](int lane) { return lane % 8 * 4; });
    p += n / 2;
    const int low = count == W ? word<4>(p) : word(p, std::min<int64_t>(4, count / 2));
    const int high = count == W ? word<4>(p + 4) : count > 8 ? word(p + 4, count / 2 - 4) : 0;
    const __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(low), 0xff00, high);
    return _mm512_srlv_epi32(both, _mm512_load_si512(shift.x));
  } else if constexpr (BITS == 2) {
    static constexpr EachLane<int> shift([](int lane) { return lane * 2; });
    const int x = count == W ? word<4>(p + n / 4) : word(p + n / 4, count / 4);
    return _mm512_srlv_epi32(_mm512_set1_epi32(x), _mm512_load_si512(shift.x));
  } else {
    static constexpr EachLane<int> of_low(
        [](int lane) { return lane % 2 * 16 + lane / 8 * 8 + lane % 8 / 2 * 2; });
    static constexpr EachLane<int> of_high([](int lane) { return lane; });
    auto two = [&](const uint8_t* q) { return count == W ? word<2>(q) : word<1>(q); };
    p += n / 8;
    const __m512i low = _mm512_set1_epi32(two(p) | two(p + width / 8) << 16);
    const __m512i high = _mm512_set1_epi32(two(p + width / 4) << 2);
    return _mm512_ternarylogic_epi32(  // two bits of the one, and the third of the other
        _mm512_srlv_epi32(low, _mm512_load_si512(of_low.x)),
        _mm512_srlv_epi32(high, _mm512_load_si512(of_high.x)), _mm512_set1_epi32(3), 0xe4);
  }
}

template <int BITS>
V levels(const uint8_t* p, uint64_t n, int64_t width, int64_t count) {
  // The table is read at the lowest four bits of a lane: those above the code do not matter
  static constexpr EachLane<float> table(
      [](int lane) { return lane % (1 << BITS) - ((1 << BITS) - 1) / 2.f; });
  return _mm512_permutexvar_ps(low_codes<BITS>(p, n, width, count), _mm512_load_ps(table.x));
}
#elif defined(CPU_CAPABILITY_AVX2)
template <int BITS>
V levels(const uint8_t* p, uint64_t n, int64_t width, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (BITS == 4) {
    const int x = count == W ? word<4>(p + n / 2) : word(p + n / 2, count / 2);
    const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(x), _mm256_slli_epi32(lane, 2));
    const __m256 number = _mm256_cvtepi32_ps(_mm256_and_si256(code, _mm256_set1_epi32(15)));
    return _mm256_sub_ps(number, _mm256_set1_ps(7.5f));
  } else if constexpr (BITS == 2) {
    // the table is read at the lowest three bits of an index, the third of which does not matter
    const __m256 table = _mm256_setr_ps(-1.5f, -.5f, .5f, 1.5f, -1.5f, -.5f, .5f, 1.5f);
    const int x = count == W ? word<2>(p + n / 4) : word<1>(p + n / 4);
    const __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(x), _mm256_slli_epi32(lane, 1));
    return _mm256_permutevar8x32_ps(table, code);
  } else {
    const __m256 table = _mm256_setr_ps(-3.5f, -2.5f, -1.5f, -.5f, .5f, 1.5f, 2.5f, 3.5f);
    const uint8_t* q = p + n / 8;
    const __m256i x = _mm256_set1_epi32(q[0] | q[width / 8] << 8 | q[width / 4] << 16);
    const __m256i low = _mm256_srlv_epi32(x, _mm256_setr_epi32(0, 8, 2, 10, 4, 12, 6, 14));
    const __m256i high =  // moved to the third bit
        _mm256_srlv_epi32(x, _mm256_add_epi32(lane, _mm256_set1_epi32(14)));
    const __m256i code = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(3)),
                                         _mm256_and_si256(high, _mm256_set1_epi32(4)));
    return _mm256_permutevar8x32_ps(table, code);
  }
}
#else
template <int BITS>
V levels(const uint8_t* p, uint64_t n, int64_t width, int64_t count) {
  float all[W] = {};
  for (int64_t i = 0; i < count; ++i) all[i] = level<BITS>(p, n + i, width);
  return V::loadu(all);
}
#endif

// The same for any bits
template <int BITS>
V numbers(const uint8_t* p, uint64_t n, int64_t width, int64_t count) {
  if constexpr (BITS == 16)
    return load(reinterpret_cast<const at::BFloat16*>(p) + n, count);
  else if constexpr (BITS == 8)
    return load(reinterpret_cast<const int8_t*>(p) + n, count);
  else
    return levels<BITS>(p, n, width, count);
}

// Calls use(bits) with a constant
template <class Use>
C10_ALWAYS_INLINE void with_bits(int64_t bits, const Use& use) {
  switch (bits) {
    case 16: return use(std::integral_constant<int, 16>());
    case 8: return use(std::integral_constant<int, 8>());
    case 4: return use(std::integral_constant<int, 4>());
    case 3: return use(std::integral_constant<int, 3>());
    default: use(std::integral_constant<int, 2>());
  }
}

// Rows of one latent, from a slot on
struct Codes {
  using Factor = float;  // what they are multiplied with

  const Packing* packing;
  const uint8_t *codes, *scales;
  int64_t step, room;  // bytes from a slot to the next, and of a row from the first of codes on

  int64_t vectors() const { return packing->vectors; }

  // What a query becomes: its numbers in the order of codes, and zeros where there are none
  int64_t factors() const { return vectors() * W; }
  void make_factors(const float* query, float* y) const {
    std::fill_n(y, factors(), 0.f);
    for (int64_t j = 0; j < packing->width; ++j) y[packing->columns[j]] = query[j];
  }
  Codes skip(int64_t slots) const {
    return {packing, codes + slots * step, scales + slots * step, step, room};
  }

  // Calls use(i, numbers) for vectors `begin` to `end` of the latent in slot t. It is inlined, so
  // that the sums of a caller stay in registers.
  template <class Use>
  C10_ALWAYS_INLINE void for_each_vector(int64_t t, int64_t begin, int64_t end,
                                         const Use& use) const {
    const uint8_t *p = codes + t * step, *scale = scales + t * step;
    for (const Segment& s : packing->segments) {
      const V factor(s.bits == 16 ? 1.f : scale_of(*scale++));
      auto unpack = [&](auto bits) C10_ALWAYS_INLINE_ATTRIBUTE {
        constexpr int BITS = decltype(bits)::value;
        const uint8_t* q = p + s.offset;
        const int64_t whole = std::min(end, s.first + s.width / W);
        int64_t i = std::max(begin, s.first);
        for (; i < whole; ++i)
          use(i, numbers<BITS>(q, (i - s.first) * W, s.width, W) * factor);
        if (i < std::min(end, s.end))
          use(i, numbers<BITS>(q, (i - s.first) * W, s.width, s.width % W) * factor);
      };
      with_bits(s.bits, unpack);
    }
  }

  // A hint that slot t will be read soon
  void fetch(int64_t t) const {
    for (int64_t i = 0; i < packing->code_bytes; i += 64) prefetch(codes + t * step + i);
    prefetch(scales + t * step);
  }
  int64_t ahead() const { return std::max<int64_t>(8, AHEAD / step); }  // slots
};

}  // namespace

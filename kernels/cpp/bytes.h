// Vectors of bytes in lanes of four, one lane a slot, and their products, where the processor
// multiplies bytes: with AVX-512, best with its VNNI. With AVX2, numbers in fp32 are faster.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

#ifdef CPU_CAPABILITY_AVX512
#define MULTIPLIES_BYTES

// Whether codes are multiplied as bytes in a model of T: two bytes keep more digits than bf16 has,
// and fewer than fp32
template <class T>
constexpr bool multiplies_bytes = std::is_same_v<T, at::BFloat16>;
#else
template <class T>
constexpr bool multiplies_bytes = false;
#endif

#ifdef MULTIPLIES_BYTES

namespace {

using Bytes = __m512i;
inline Bytes repeat(int x) { return _mm512_set1_epi32(x); }
inline Bytes low_pairs(Bytes a, Bytes b) { return _mm512_unpacklo_epi32(a, b); }
inline Bytes high_pairs(Bytes a, Bytes b) { return _mm512_unpackhi_epi32(a, b); }
inline Bytes low_halves(Bytes a, Bytes b) { return _mm512_unpacklo_epi64(a, b); }
inline Bytes high_halves(Bytes a, Bytes b) { return _mm512_unpackhi_epi64(a, b); }
inline V as_floats(Bytes x) { return _mm512_castsi512_ps(x); }
inline Bytes as_bytes(V x) { return _mm512_castps_si512(x); }
inline V to_floats(Bytes x) { return _mm512_cvtepi32_ps(x); }
inline Bytes to_integers(V x) { return _mm512_cvtps_epi32(x); }  // the nearest
inline Bytes larger(Bytes a, Bytes b) { return _mm512_max_epi32(a, b); }
inline int largest_lane(Bytes x) { return _mm512_reduce_max_epi32(x); }

using Numbers32 = uint32_t __attribute__((vector_size(4 * W)));
inline Bytes plus(Bytes a, Bytes b) { return Bytes(Numbers32(a) + Numbers32(b)); }
inline Bytes minus(Bytes a, Bytes b) { return Bytes(Numbers32(a) - Numbers32(b)); }
inline Bytes up(Bytes x, int bits) { return Bytes(Numbers32(x) << bits); }
inline Bytes down(Bytes x, int bits) { return Bytes(Numbers32(x) >> bits); }

// sum + the products of every lane's four bytes: x without signs, below 2 ** DIGITS, and y with
// them. A number of two such bytes has twice as many digits.
#ifdef __AVX512VNNI__
constexpr int DIGITS = 8;
C10_ALWAYS_INLINE Bytes add_products(Bytes sum, Bytes x, Bytes y) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));  // GCC 12 copies sums of the intrinsic
  return sum;
}
#else
constexpr int DIGITS = 7;  // 16 bits hold two products of 127 x 128, but not of 255 x 128
inline Bytes add_products(Bytes sum, Bytes x, Bytes y) {
  const Bytes pairs = _mm512_maddubs_epi16(x, y);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

// Bytes of a table of 16, by bytes below 16
inline Bytes repeat_bytes(__m128i x) { return _mm512_broadcast_i32x4(x); }
inline Bytes look_up(Bytes table, Bytes x) { return _mm512_shuffle_epi8(table, x); }

// Stores the lowest byte of all lanes
inline void store_bytes(Bytes x, uint8_t* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

// Bytes `from` up to `to` of 16, zeros around them. Nothing else is read.
inline __m128i load_bytes(const uint8_t* p, int64_t from, int64_t to) {
  return _mm_maskz_loadu_epi8((1u << to) - (1u << from), p);
}

// The first `count` of 16 bytes, followed by zeros. Nothing is read past them.
inline __m128i load_bytes(const uint8_t* p, int64_t count) {
  if (count == 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_maskz_loadu_epi8(0xffffu >> (16 - count), p);
}

// `count` <= 16 bytes of W rows that are `step` bytes apart, turned around: lane i of columns[j]
// holds bytes 4 j to 4 j + 3 of row i. Rows after number `last` are not read, but it is, again.
inline void load_columns(const uint8_t* p, int64_t step, int64_t last, int64_t count,
                         Bytes* columns) {
  auto transpose = [&](auto row) {
    Bytes x[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_broadcast_i32x4(row(i));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x00f0, row(i + 4));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x0f00, row(i + 8));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0xf000, row(i + 12));
    }
    const Bytes a = low_pairs(x[0], x[1]), b = high_pairs(x[0], x[1]), c = low_pairs(x[2], x[3]),
                d = high_pairs(x[2], x[3]);
    columns[0] = low_halves(a, c);
    columns[1] = high_halves(a, c);
    columns[2] = low_halves(b, d);
    columns[3] = high_halves(b, d);
  };
  if (count == 16 && last == W - 1)
    transpose([&](int64_t i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * step));
    });
  else
    transpose([&](int64_t i) { return load_bytes(p + std::min(i, last) * step, count); });
}

// The bytes of W columns and four rows, row(j): lane i holds byte i of each
template <class Row>
C10_ALWAYS_INLINE Bytes quads(const Row& row) {
  Bytes x = _mm512_castsi128_si512(row(0));
  x = _mm512_inserti32x4(x, row(1), 1);
  x = _mm512_inserti32x4(x, row(2), 2);
  x = _mm512_inserti32x4(x, row(3), 3);
  const Bytes turned = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
  return _mm512_shuffle_epi8(turned, _mm512_broadcast_i32x4(_mm_setr_epi8(
                                         0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

// `scale_of` codes in lanes
inline V scales_of(Bytes code) { return as_floats(plus(up(code, 20), repeat(107 << 23))); }

}  // namespace

#endif

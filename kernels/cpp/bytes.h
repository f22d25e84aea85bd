// Vectors of bytes in lanes of four, one lane a slot, and their products, where the processor
// multiplies bytes: with AVX-512, best with its VNNI, or with AVX2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "vectors.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#define MULTIPLIES_BYTES

namespace {

#ifdef CPU_CAPABILITY_AVX512
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
inline int lanes_sum(Bytes x) { return _mm512_reduce_add_epi32(x); }
inline int largest_lane(Bytes x) { return _mm512_reduce_max_epi32(x); }
#else
using Bytes = __m256i;
inline Bytes repeat(int x) { return _mm256_set1_epi32(x); }
inline Bytes low_pairs(Bytes a, Bytes b) { return _mm256_unpacklo_epi32(a, b); }
inline Bytes high_pairs(Bytes a, Bytes b) { return _mm256_unpackhi_epi32(a, b); }
inline Bytes low_halves(Bytes a, Bytes b) { return _mm256_unpacklo_epi64(a, b); }
inline Bytes high_halves(Bytes a, Bytes b) { return _mm256_unpackhi_epi64(a, b); }
inline V as_floats(Bytes x) { return _mm256_castsi256_ps(x); }
inline Bytes as_bytes(V x) { return _mm256_castps_si256(x); }
inline V to_floats(Bytes x) { return _mm256_cvtepi32_ps(x); }
inline Bytes to_integers(V x) { return _mm256_cvtps_epi32(x); }  // the nearest
inline Bytes larger(Bytes a, Bytes b) { return _mm256_max_epi32(a, b); }
inline int lanes_sum(Bytes x) {
  alignas(32) int lanes[W];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
  return std::accumulate(lanes, lanes + W, 0);
}
inline int largest_lane(Bytes x) {
  alignas(32) int lanes[W];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
  return *std::max_element(lanes, lanes + W);
}
#endif

using Numbers32 = uint32_t __attribute__((vector_size(4 * W)));
inline Bytes plus(Bytes a, Bytes b) { return Bytes(Numbers32(a) + Numbers32(b)); }
inline Bytes up(Bytes x, int bits) { return Bytes(Numbers32(x) << bits); }
inline Bytes down(Bytes x, int bits) { return Bytes(Numbers32(x) >> bits); }

// sum + the products of every lane's four bytes, x without signs and y with them. SIGNED: x has
// them too, and UNSIGNED_ZERO was added to it.
#if defined(__AVX512VNNI__) && defined(CPU_CAPABILITY_AVX512)
constexpr int UNSIGNED_ZERO = 128;
template <bool SIGNED>
Bytes add_products(Bytes sum, Bytes x, Bytes y) {
  return _mm512_dpbusd_epi32(sum, x, y);
}
#elif defined(CPU_CAPABILITY_AVX512)
constexpr int UNSIGNED_ZERO = 0;  // 16 bits hold two products of 127 x 128, but not of 127 x 255
template <bool SIGNED>
Bytes add_products(Bytes sum, Bytes x, Bytes y) {
  if constexpr (SIGNED) {
    y = _mm512_mask_sub_epi8(y, _mm512_movepi8_mask(x), _mm512_setzero_si512(), y);
    x = _mm512_abs_epi8(x);
  }
  const Bytes pairs = _mm512_maddubs_epi16(x, y);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#else
constexpr int UNSIGNED_ZERO = 0;  // 16 bits hold two products of 127 x 128, but not of 127 x 255
template <bool SIGNED>
Bytes add_products(Bytes sum, Bytes x, Bytes y) {
  if constexpr (SIGNED) {
    y = _mm256_sign_epi8(y, x);
    x = _mm256_abs_epi8(x);
  }
  const Bytes pairs = _mm256_maddubs_epi16(x, y);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

// Stores the lowest byte of `count` lanes
inline void store_bytes(Bytes x, int8_t* p, int64_t count) {
#ifdef CPU_CAPABILITY_AVX512
  _mm512_mask_cvtepi32_storeu_epi8(p, 0xffffu >> (W - count), x);
#else
  alignas(32) int lanes[W];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
  std::copy_n(lanes, count, p);
#endif
}

// The first `count` of 16 bytes, followed by zeros. Nothing is read past them.
inline __m128i load_bytes(const uint8_t* p, int64_t count) {
#ifdef CPU_CAPABILITY_AVX512
  return _mm_maskz_loadu_epi8(0xffffu >> (16 - count), p);
#else
  uint8_t all[16] = {};
  std::memcpy(all, p, count);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(all));
#endif
}

// `count` <= 16 bytes of W rows that are `step` bytes apart, turned around: lane i of columns[j]
// holds bytes 4 j to 4 j + 3 of row i. Rows after number `last` are not read, but it is, again.
inline void load_columns(const uint8_t* p, int64_t step, int64_t last, int64_t count,
                         Bytes* columns) {
  auto transpose = [&](auto row) {
    Bytes x[4];
    for (int i = 0; i < 4; ++i) {
#ifdef CPU_CAPABILITY_AVX512
      x[i] = _mm512_broadcast_i32x4(row(i));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x00f0, row(i + 4));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0x0f00, row(i + 8));
      x[i] = _mm512_mask_broadcast_i32x4(x[i], 0xf000, row(i + 12));
#else
      x[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(row(i)), row(i + 4), 1);
#endif
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

}  // namespace

#endif

// How the two products (multiply.h, weighted_sum.h) load and multiply numbers of two types.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace {

// `Factor<T>`: the type in which the other factor is given, where one factor has type T. It is bf16
// where the processor multiplies pairs of bf16, otherwise fp32.
#ifdef __AVX512BF16__
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, at::BFloat16>, at::BFloat16, float>;
#else
template <class T>
using Factor = float;
#endif

// Products of numbers of A and of T, summed in fp32. A lane holds DEPTH numbers, a vector COUNT.
template <class A, class T>
struct Lanes {
  static constexpr int64_t DEPTH = 1, COUNT = W;
  using X = V;
  static V left(const A* p, int64_t count) { return load(p, count); }
  static V right(const T* p, int64_t count) { return load(p, count); }
  // DEPTH numbers at p, repeated in every lane
  static V broadcast(const A* p, int64_t) { return V(float(*p)); }
  // DEPTH rows of `count` columns, the numbers of a column in one lane
  static V column(const T* p, int64_t, int64_t, int64_t count) { return load(p, count); }
  static V add(V a, V b, V sum) { return at::vec::fmadd(a, b, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Lanes<at::BFloat16, at::BFloat16> {
  static constexpr int64_t DEPTH = 2, COUNT = 2 * W;
  using X = __m512i;
  static X left(const at::BFloat16* p, int64_t count) { return right(p, count); }
  static X right(const at::BFloat16* p, int64_t count) {
    return count == COUNT ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  static X broadcast(const at::BFloat16* p, int64_t rows) {
    int both;
    if (rows < 2) return _mm512_set1_epi32(p[0].x);
    std::memcpy(&both, p, sizeof both);
    return _mm512_set1_epi32(both);
  }
  static X column(const at::BFloat16* p, int64_t ld, int64_t rows, int64_t count) {
    X x = widen(p, count);
    return rows > 1 ? _mm512_or_si512(x, _mm512_slli_epi32(widen(p + ld, count), 16)) : x;
  }
  static X widen(const at::BFloat16* p, int64_t count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(0xffffu >> (W - count), p));
  }
  static V add(X a, X b, V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

}  // namespace

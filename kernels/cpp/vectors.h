// Vectors of fp32: loads that convert to fp32, stores that convert from it, sums across lanes.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

namespace {

using V = at::vec::Vectorized<float>;
constexpr int64_t W = V::size();  // fp32 numbers in a vector

// `width` rounded up to whole vectors
inline int64_t round_up(int64_t width) { return (width + W - 1) / W * W; }

inline V load(const float* p) { return V::loadu(p); }
inline V load(const at::BFloat16* p) {
  V x;
  at::vec::load_fp32_from_bf16(p, x);
  return x;
}
inline V load(const at::Half* p) {
  V x;
  at::vec::load_fp32_from_fp16(p, x);
  return x;
}

// The first `count` numbers, followed by zeros. Nothing is read past them: the memory there may
// belong to something else.
inline V load(const float* p, int64_t count) { return V::loadu(p, count); }
template <class T>
V load(const T* p, int64_t count) {
  if constexpr (sizeof(T) == 1) {
    float all[W] = {};
    std::copy_n(p, count, all);
    return V::loadu(all);
  } else {
    if (count == W) return load(p);
    alignas(32) T all[W] = {};
#ifdef CPU_CAPABILITY_AVX512
    if constexpr (sizeof(T) == 2) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(all),
                         _mm256_maskz_loadu_epi16((1u << count) - 1, p));
      return load(all);
    }
#endif
    std::copy_n(p, count, all);
    return load(all);
  }
}

#ifdef CPU_CAPABILITY_AVX512
inline V load(const int8_t* p, int64_t count = W) {
  const __m128i bytes = _mm_maskz_loadu_epi8(0xffffu >> (W - count), p);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
#elif defined(CPU_CAPABILITY_AVX2)
inline V load(const int8_t* p, int64_t count = W) {
  int8_t all[W] = {};
  if (count < W) p = std::copy_n(p, count, all) - count;
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
#endif

inline void store(V x, float* p, int64_t count) { x.store(p, count); }
template <class T>
void store(V x, T* p, int64_t count) {
  float numbers[W];
  x.store(numbers);
  at::vec::convert(numbers, p, count);
}

// The processor prefetches by itself while it reads in order with little arithmetic in between.
// Elsewhere it needs this hint. A hint past the end of the data has no effect.
constexpr int64_t AHEAD = 8192;  // bytes
inline void prefetch(const void* p, int64_t bytes = 0) {
  __builtin_prefetch(static_cast<const char*>(p) + bytes, 0, 2);
}

// The sum of each of W vectors
inline V horizontal_sums(const V* x) {
#ifdef CPU_CAPABILITY_AVX512
  __m512 y[W / 2], z[W / 4];  // one vector holds partial sums of two, then of four vectors
  for (int i = 0; i < W / 2; ++i)
    y[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) + _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  for (int i = 0; i < W / 4; ++i) {
    const auto a = _mm512_castps_pd(y[2 * i]), b = _mm512_castps_pd(y[2 * i + 1]);
    z[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  auto add_quarters = [](__m512 a, __m512 b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  return add_quarters(add_quarters(z[0], z[1]), add_quarters(z[2], z[3]));
#else
  float square[W * W], transposed[W * W];
  for (int i = 0; i < W; ++i) x[i].store(square + i * W);
  at::vec::transpose_mxn<float, W, W>(square, W, transposed, W);
  V total = V::loadu(transposed);
  for (int i = 1; i < W; ++i) total = total + V::loadu(transposed + i * W);
  return total;
#endif
}

}  // namespace

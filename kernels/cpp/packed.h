// Codes of 8 or 4 bits, as `Packed` in zoo/models/cache.py keeps them. They are unpacked in
// registers, to fp32, which is faster than to bf16.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vectors.h"

namespace {

// One of the two 4-bit codes in a byte; code n stands for n - 7.5
template <int SHIFT>
struct Nibble {
  uint8_t pair;
  operator float() const { return float(pair >> SHIFT & 15) - 7.5f; }
};

// Both codes of a byte: the low one belongs to the first half of a row, the high one to the second
struct Nibbles {
  uint8_t pair;
};

#ifdef CPU_CAPABILITY_AVX512
inline __m128i load_bytes(const void* p, int64_t count) {
  return _mm_maskz_loadu_epi8(0xffffu >> (W - count), p);
}
inline V load(const int8_t* p, int64_t count = W) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bytes(p, count)));
}
template <int SHIFT>
V load(const Nibble<SHIFT>* p, int64_t count = W) {
  const __m512 table = _mm512_setr_ps(-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -.5f, .5f,
                                      1.5f, 2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f);
  const __m512i pairs = _mm512_cvtepu8_epi32(load_bytes(p, count));
  return _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, SHIFT), table);  // uses the low four bits
}
#endif

// Calls use(rows, first) for each half of rows of 4-bit codes, where `first` is the column at which
// the half begins, and once for rows of anything else.
template <class T, class Use>
void for_each_half(const T* rows, int64_t size, const Use& use) {
  if constexpr (std::is_same_v<T, Nibbles>) {
    use(reinterpret_cast<const Nibble<0>*>(rows), 0);
    use(reinterpret_cast<const Nibble<4>*>(rows), size);
  } else {
    use(rows, 0);
  }
}

}  // namespace

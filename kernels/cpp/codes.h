// Codes of segments as bytes with signs, for products with bytes.
#pragma once

#include <cstdint>

#include "bytes.h"

#ifdef MULTIPLIES_BYTES
namespace {

// Of numbers of BITS bits: how many share a byte, in parts of the segment that follow one another;
// with 3 bits, of the lowest two
template <int BITS>
constexpr int64_t PARTS = BITS == 3 ? 4 : 8 / BITS;

// What a byte of `signed_codes` stands for: levels are halves, unless they have 8 bits
template <int BITS>
constexpr float UNIT = BITS == 8 ? 1.f : .5f;

// Twice the levels of 4, 3 or 2 bits, by code
template <int BITS>
Bytes doubled_levels() {
  alignas(16) int8_t table[16];
  for (int i = 0; i < 16; ++i) table[i] = 2 * (i % (1 << BITS)) - ((1 << BITS) - 1);
  return repeat_bytes(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

// The numbers of part `part` of bytes x, in units of UNIT. table: `doubled_levels`. With 3 bits,
// `high` holds the third bits in the place of the lowest, else it is not read.
template <int BITS>
C10_ALWAYS_INLINE Bytes signed_codes(Bytes x, Bytes high, int part, Bytes table) {
  if constexpr (BITS == 8) return x;
  constexpr int STEP = BITS == 4 ? 4 : 2;
  x = down(x, STEP * part) & repeat(((1 << STEP) - 1) * 0x01010101);
  if constexpr (BITS == 3) x = x | up(down(high, 2 * part) & repeat(0x01010101), 2);
  return look_up(table, x);
}

}  // namespace
#endif

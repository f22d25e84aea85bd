// Scores of rows of codes in models of bf16: queries are rounded to two bytes a number, with a
// scale per segment, and multiplied byte by code. One byte is too few: a few numbers of a query are
// large in real models, and outputs of attention would change by 1 to 3 %.
//
// W slots lie in the lanes of a vector, and a lane holds four codes of one slot. So the scale of a
// segment is a vector, no sum runs across lanes, and codes that were unpacked once serve all
// queries of their latent.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "bytes.h"
#include "packed.h"
#include "words.h"

namespace {

#ifdef MULTIPLIES_BYTES
// Rows of codes that are multiplied with rounded queries
struct RoundedCodes {
  using Factor = int;

  Codes rows;
  const Words* words;

  RoundedCodes skip(int64_t slots) const { return {rows.skip(slots), words}; }
  int64_t factors() const { return words->size; }
  void make_factors(const float* query, int* y) const { round_query(query, *words, y); }
};

// out[m][i] = a[m] · slot i for rows <= M queries and the slots in the lanes of `tile`, `count` of
// them
template <int M>
void multiply_tile(int64_t rows, const int* a, int64_t lda, const Words& words, const Bytes* tile,
                   const V* scales, int64_t count, float* out, int64_t ldo) {
  if constexpr (M > 1)
    if (rows < M)
      return multiply_tile<M - 1>(rows, a, lda, words, tile, scales, count, out, ldo);
  V total[M];
  for (auto& x : total) x = V(0.f);
  const int* factors = a + 2 * words.count;
  for (const Words::Range& s : words.ranges) {
    if (s.bits == 16) {
      for (int64_t w = s.begin; w < s.end; ++w)
        for (int m = 0; m < M; ++m)
          total[m] =
              at::vec::fmadd(as_floats(repeat(a[m * lda + w])), as_floats(tile[w]), total[m]);
      continue;
    }
    Bytes high[M], low[M];
    for (int m = 0; m < M; ++m) high[m] = repeat(factors[m * lda]);
    for (int m = 0; m < M; ++m) low[m] = repeat(factors[m * lda + 1]);
    auto add = [&](auto with_sign) C10_ALWAYS_INLINE_ATTRIBUTE {
      constexpr bool SIGNED = decltype(with_sign)::value;
      for (int64_t w = s.begin; w < s.end; ++w) {
        const Bytes x = tile[w];
        for (int m = 0; m < M; ++m) {
          const int* y = a + m * lda + w;
          high[m] = add_products<SIGNED>(high[m], x, repeat(*y));
          low[m] = add_products<SIGNED>(low[m], x, repeat(y[words.count]));
        }
      }
    };
    s.bits == 8 ? add(std::true_type()) : add(std::false_type());
    for (int m = 0; m < M; ++m) {
      Factors f;
      std::memcpy(&f, factors + m * lda, sizeof f);
      const V sum = at::vec::fmadd(to_floats(low[m]), V(LOW), to_floats(high[m]));
      total[m] = at::vec::fmadd(at::vec::fmadd(sum, V(f.scale), V(f.add)), *scales, total[m]);
    }
    ++scales;
    factors += 4;
  }
  for (int m = 0; m < M; ++m) total[m].store(out + m * ldo, count);
}

// The words of every part of a plane from four of its bytes on, in W slots. Codes are moved to bit
// PLACE.
template <int BITS, int PLACE>
void unpack_words(Bytes x, int64_t apart, Bytes* out) {
  if constexpr (BITS == 16) {
    out[0] = up(x, 16);
    out[apart] = x & repeat(0xffff0000);
  } else if constexpr (BITS == 8) {
    out[0] = x ^ repeat(UNSIGNED_ZERO * 0x01010101u);
  } else {
    const Bytes mask = repeat((((1 << BITS) - 1) << PLACE) * 0x01010101);
    for (int i = 0; i < 8 / BITS; ++i) {
      const int n = i * BITS - PLACE;
      out[i * apart] = (n < 0 ? up(x, -n) : down(x, n)) & mask;
    }
  }
}

// The words of W slots, of which those up to number `last` exist, and the scales of their segments
inline void unpack_tile(const RoundedCodes& x, int64_t last, Bytes* tile, V* scales) {
  Bytes columns[4];
  for (const Plane& plane : x.words->planes)
    for (int64_t i = 0; i < plane.words(); i += 4) {
      const int64_t at = plane.offset + 4 * i, n = std::min<int64_t>(4, plane.words() - i);
      load_columns(x.rows.codes + at, x.rows.step, last, std::min<int64_t>(16, x.rows.room - at),
                   columns);
      auto unpack = [&](auto bits, auto place) {
        for (int64_t j = 0; j < n; ++j)
          unpack_words<decltype(bits)::value, decltype(place)::value>(
              columns[j], plane.words(), tile + plane.word + i + j);
      };
      using std::integral_constant;
      const integral_constant<int, 0> lowest;
      switch (plane.bits) {
        case 16: unpack(integral_constant<int, 16>(), lowest); break;
        case 8: unpack(integral_constant<int, 8>(), lowest); break;
        case 4: unpack(integral_constant<int, 4>(), lowest); break;
        case 2: unpack(integral_constant<int, 2>(), lowest); break;
        default: unpack(integral_constant<int, 1>(), integral_constant<int, 2>());
      }
      // behind the last number may be no number at all, whose product with 0 would not be 0
      if (plane.bits == 16 && plane.bytes % 4) tile[plane.word + 2 * plane.words() - 1] = repeat(0);
    }
  const int64_t from = x.rows.scales - x.rows.codes;
  for (int64_t i = 0; i < x.rows.packing->scales; ++i) {
    if (i % 16 == 0)
      load_columns(x.rows.scales + i, x.rows.step, last,
                   std::min<int64_t>(16, x.rows.room - from - i), columns);
    const Bytes code = down(columns[i % 16 / 4], i % 4 * 8) & repeat(255);
    scales[i] = as_floats(plus(up(code, 20), repeat(107 << 23)));  // as `scale_of`
  }
}

// out (rows, cols) = a (rows, size) bᵀ, for `cols` slots from the first of b on
inline void multiply(const int* a, int64_t rows, int64_t lda, const RoundedCodes& b, int64_t cols,
                     float* out, int64_t ldo) {
  constexpr int MOST = W == 16 ? 9 : 4;  // rows whose sums fit the registers
  thread_local std::vector<Bytes> tile;
  thread_local std::vector<V> scales;
  tile.resize(b.words->count);
  scales.resize(b.rows.packing->scales);
  for (int64_t n = 0; n < cols; n += W) {
    const int64_t count = std::min(W, cols - n);
    const RoundedCodes some = b.skip(n);
    for (int64_t i = 0; i < count; ++i) some.rows.fetch(i + some.rows.ahead());
    unpack_tile(some, count - 1, tile.data(), scales.data());
    int64_t m = 0;
    for (int64_t blocks = (rows + MOST - 1) / MOST; blocks; --blocks) {  // of nearly equal size
      const int64_t of_block = (rows - m + blocks - 1) / blocks;
      multiply_tile<MOST>(of_block, a + m * lda, lda, *b.words, tile.data(), scales.data(), count,
                          out + m * ldo + n, ldo);
      m += of_block;
    }
  }
}
#endif

}  // namespace

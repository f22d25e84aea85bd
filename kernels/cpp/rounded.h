// Scores of rows of codes in models of bf16: queries are rounded to two bytes a number and
// multiplied byte by code. One byte is too few: a few numbers of a query are large in real models,
// and outputs of attention would change by 1 to 3 %.
//
// W slots lie in the lanes of a vector, and a lane holds four codes of one slot. So the scale of a
// segment is a vector, no sum runs across lanes, and codes that were unpacked once serve all
// queries of their latent.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "bytes.h"
#include "codes.h"
#include "packed.h"
#include "tiles.h"
#include "words.h"

#ifdef MULTIPLIES_BYTES
namespace {

// Rows of codes that are multiplied with rounded queries
struct RoundedCodes {
  using Factor = int;

  Codes rows;
  const Words* words;

  RoundedCodes skip(int64_t slots) const { return {rows.skip(slots), words}; }
  int64_t factors() const { return words->size; }
  void make_factors(const float* query, int* y) const { round_query(query, *words, y); }
};

// W slots of a latent, unpacked. By segment: what the sums of high bytes begin with, see
// `make_starts`; and the scales.
struct Unpacked {
  std::vector<Bytes> codes, bytes, starts;
  std::vector<V> scales;
};

// What a row of queries was divided by
inline V divisor(const int* row, const Words& words) {
  float x;
  std::memcpy(&x, row + 2 * words.count, sizeof x);
  return V(x);
}

// Adds the products of words of queries, high bytes at y and low ones at z, with those of slots.
// Sums stay in registers, since all their indices are constants.
template <size_t... M>
void add_words(const int* y, const int* z, int64_t lda, const Bytes* codes, int64_t count,
               Bytes* high, Bytes* low, std::index_sequence<M...>) {
  Bytes h[] = {high[M]...}, l[] = {low[M]...};
  for (int64_t w = 0; w < count; ++w, ++y, ++z) {
    const Bytes x = codes[w];
    ((h[M] = add_products(h[M], repeat(y[M * lda]), x),
      l[M] = add_products(l[M], repeat(z[M * lda]), x)),
     ...);
  }
  ((high[M] = h[M], low[M] = l[M]), ...);
}

// out[m][i] = a[m] · slot i for rows <= M queries and the slots in the lanes of x, `count` of them
template <int M>
void multiply_tile(int64_t rows, const int* a, int64_t lda, const Words& words, const Unpacked& x,
                   int64_t count, float* out, int64_t ldo) {
  if constexpr (M > 1)
    if (rows < M) return multiply_tile<M - 1>(rows, a, lda, words, x, count, out, ldo);
  V total[M];
  for (auto& sum : total) sum = V(0.f);
  for (size_t i = 0; i < words.ranges.size(); ++i) {
    const Words::Range& s = words.ranges[i];
    if (s.bits == 16) {
      for (int64_t w = s.begin; w < s.end; ++w)
        for (int m = 0; m < M; ++m)
          total[m] =
              at::vec::fmadd(as_floats(repeat(a[m * lda + w])), as_floats(x.codes[w]), total[m]);
      continue;
    }
    Bytes high[M], low[M];
    for (int m = 0; m < M; ++m) high[m] = x.starts[i], low[m] = repeat(0);
    add_words(a + s.begin, a + words.count + s.begin, lda, &x.codes[s.begin], s.end - s.begin, high,
              low, std::make_index_sequence<M>());
    for (int m = 0; m < M; ++m) {
      const V sum = at::vec::fmadd(to_floats(high[m]), V(1 << DIGITS), to_floats(low[m]));
      total[m] = at::vec::fmadd(sum, x.scales[i], total[m]);
    }
  }
  for (int m = 0; m < M; ++m)
    (total[m] * divisor(a + m * lda, words)).store(out + m * ldo, count);
}

// Calls use(w, x) with every word of `bytes` bytes of W slots, of which those up to number `last`
// exist. room: bytes that may be read of each
template <class Use>
C10_ALWAYS_INLINE void for_each_word(const uint8_t* p, int64_t step, int64_t last, int64_t bytes,
                                     int64_t room, const Use& use) {
  Bytes columns[4];
  for (int64_t i = 0; i < bytes; i += 16) {
    load_columns(p + i, step, last, std::min<int64_t>(16, room - i), columns);
    if (i + 16 <= bytes)
      for (int64_t j = 0; j < 4; ++j) use(i / 4 + j, columns[j]);
    else
      for (int64_t j = 0; i + 4 * j < bytes; ++j) use(i / 4 + j, columns[j]);
  }
}

// The third bits of a segment of 3 bits: word w has those of bytes 4 w to 4 w + 3 of every quarter,
// a quarter's in bit 2 * quarter. x: the words of their `eighth` bytes, which hold even eighths in
// even bits and odd ones beside them
inline void third_bits(const Bytes* x, int64_t eighth, int64_t words, Bytes* y) {
  const int64_t n = eighth / 4;
  if (eighth % 4 == 0) {
    for (int64_t w = 0; w < n; ++w) y[w] = x[w], y[n + w] = down(x[w], 1);
    return;
  }
  for (int64_t i = 0; i < 4 * words; ++i) {
    const int64_t from = i % eighth;
    const Bytes byte = down(down(x[from / 4], from % 4 * 8) & repeat(255), i / eighth % 2);
    y[i / 4] = i % 4 ? y[i / 4] | up(byte, i % 4 * 8) : byte;
  }
}

// The codes of a segment in W slots, of which those up to number `last` exist
template <int BITS>
void unpack_codes(const RoundedCodes& x, const Words::Range& s, int64_t last, Unpacked& y) {
  const uint8_t* p = x.rows.codes + s.offset;
  const int64_t n = s.words(), room = x.rows.room - s.offset;
  const Bytes table = doubled_levels<BITS>();
  Bytes *to = &y.codes[s.begin], *third = y.bytes.data();
  if constexpr (BITS == 3) {
    Bytes* packed = third + n;
    for_each_word(p + s.bytes, x.rows.step, last, s.width / 8, room - s.bytes,
                  [&](int64_t w, Bytes bytes) { packed[w] = bytes; });
    third_bits(packed, s.width / 8, n, third);
  }
  for_each_word(p, x.rows.step, last, s.bytes, room, [&](int64_t w, Bytes bytes) {
    for (int part = 0; part < PARTS<BITS>; ++part)
      to[part * n + w] = signed_codes<BITS>(bytes, BITS == 3 ? third[w] : bytes, part, table);
  });
}

// W slots of x, of which those up to number `last` exist
inline void unpack_tile(const RoundedCodes& x, int64_t last, Unpacked& y) {
  const Words& words = *x.words;
  y.codes.resize(words.count + TILE_ROWS - 1);  // tiles of 16 words are read
  y.bytes.resize(2 * words.count);
  y.scales.resize(words.ranges.size());
  const int64_t from = x.rows.scales - x.rows.codes;
  Bytes scales[4];
  int64_t scale = 0;
  for (size_t i = 0; i < words.ranges.size(); ++i) {
    const Words::Range& s = words.ranges[i];
    if (s.bits == 16) {
      const int64_t n = s.words();
      for_each_word(x.rows.codes + s.offset, x.rows.step, last, s.bytes, x.rows.room - s.offset,
                    [&](int64_t w, Bytes bytes) {
                      y.codes[s.begin + w] = up(bytes, 16);
                      y.codes[s.begin + n + w] = bytes & repeat(0xffff0000);
                    });
      // behind the last number may be no number at all, whose product with 0 would not be 0
      if (s.width % 2) y.codes[s.end - 1] = repeat(0);
      continue;
    }
    float unit = 1.f;
    with_bits(s.bits, [&](auto bits) {
      if constexpr (bits != 16) {
        unpack_codes<bits>(x, s, last, y);
        unit = UNIT<bits>;
      }
    });
    if (scale % 16 == 0)
      load_columns(x.rows.scales + scale, x.rows.step, last,
                   std::min<int64_t>(16, x.rows.room - from - scale), scales);
    const Bytes code = down(scales[scale % 16 / 4], scale % 4 * 8) & repeat(255);
    y.scales[i] = scales_of(code) * V(unit);
    ++scale;
  }
}

// Sums of high bytes begin with these, because the zero of queries is QUERY_ZERO
inline void make_starts(const Words& words, Unpacked& x) {
  x.starts.clear();
  for (const Words::Range& s : words.ranges) {
    Bytes sum = repeat(0);
    if (s.bits != 16)
      for (int64_t w = s.begin; w < s.end; ++w)
        sum = add_products(sum, repeat(0x01010101), x.codes[w]);
    x.starts.push_back(minus(repeat(0), up(sum, DIGITS - 1)));
  }
}

// The codes of W slots from number n of `cols` on, and what the processor will read next
inline void read_tile(const RoundedCodes& b, int64_t n, int64_t cols, Unpacked& x) {
  const RoundedCodes some = b.skip(n);
  const int64_t count = std::min(W, cols - n);
  for (int64_t i = 0; i < count; ++i) some.rows.fetch(i + some.rows.ahead());
  unpack_tile(some, count - 1, x);
}

#ifdef MULTIPLIES_TILES
// High and low bytes of queries, as tiles of 64 bytes of 16 rows, whose high bytes have signs: zero
// is then zero, and so is what fills a tile behind the last word of a segment.
struct TiledQueries {
  struct alignas(64) Pair {
    uint8_t high[TILE_ROWS][TILE_BYTES], low[TILE_ROWS][TILE_BYTES];
  };
  std::vector<Pair> pairs;

  TwoBytes from(int64_t pair) const {
    return {pairs[pair].high[0], pairs[pair].low[0], TILE_BYTES, sizeof(Pair)};
  }

  // a: (rows, lda), as `round_query` leaves them; at most 16 rows
  void fill(const int* a, int64_t rows, int64_t lda, const Words& words) {
    pairs.resize(words.count / TILE_ROWS + words.ranges.size());  // the most that there can be
    auto pair = pairs.begin();
    for (const Words::Range& s : words.ranges)
      for (int64_t w = s.begin; s.bits != 16 && w < s.end; w += W) {
        Pair& to = *pair++;
        const __mmask16 exist = 0xffffu >> (W - std::min(W, s.end - w));
        for (int64_t m = 0; m < rows; ++m) {
          const int* row = a + m * lda + w;
          const Bytes high = _mm512_maskz_loadu_epi32(exist, row);
          _mm512_store_si512(to.high[m],
                             _mm512_maskz_xor_epi32(exist, high, repeat(int(0x80808080))));
          _mm512_store_si512(to.low[m], _mm512_maskz_loadu_epi32(exist, row + words.count));
        }
      }
  }
};

// As `multiply`, for at most 16 rows
inline void multiply_in_tiles(const int* a, int64_t rows, int64_t lda, const RoundedCodes& b,
                              int64_t cols, float* out, int64_t ldo) {
  thread_local TiledQueries queries;
  thread_local Unpacked x[2];
  thread_local std::vector<TileSums> sums;
  const Words& words = *b.words;
  queries.fill(a, rows, lda, words);
  use_tiles(rows);
  sums.resize(words.ranges.size());
  for (int64_t n = 0; n < cols; n += 2 * W) {
    const int64_t vectors = n + W < cols ? 2 : 1;
    for (int64_t i = 0; i < vectors; ++i) read_tile(b, n + i * W, cols, x[i]);
    int64_t pair = 0;
    for (size_t i = 0; i < words.ranges.size(); ++i) {
      const Words::Range& s = words.ranges[i];
      if (s.bits == 16) continue;
      const int64_t depth = (s.end - s.begin + TILE_ROWS - 1) / TILE_ROWS;
      multiply_tiles<true>(queries.from(pair), &x[0].codes[s.begin],
                           &x[vectors - 1].codes[s.begin], 1, depth, sums[i]);
      pair += depth;
    }
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t v = 0; v < vectors; ++v) {
        const int* row = a + m * lda;
        V total(0.f);
        for (size_t i = 0; i < words.ranges.size(); ++i) {
          const Words::Range& s = words.ranges[i];
          if (s.bits != 16) {
            total = at::vec::fmadd(sums[i].of(v, m), x[v].scales[i], total);
            continue;
          }
          for (int64_t w = s.begin; w < s.end; ++w)
            total = at::vec::fmadd(as_floats(repeat(row[w])), as_floats(x[v].codes[w]), total);
        }
        const int64_t first = n + v * W;
        (total * divisor(row, words)).store(out + m * ldo + first, std::min(W, cols - first));
      }
  }
}
#endif

// out (rows, cols) = a (rows, size) bᵀ, for `cols` slots from the first of b on
inline void multiply(const int* a, int64_t rows, int64_t lda, const RoundedCodes& b, int64_t cols,
                     float* out, int64_t ldo) {
#ifdef MULTIPLIES_TILES
  for (int64_t m = 0; rows >= LEAST_ROWS && m < rows; m += TILE_ROWS)
    multiply_in_tiles(a + m * lda, std::min(TILE_ROWS, rows - m), lda, b, cols, out + m * ldo, ldo);
  if (rows >= LEAST_ROWS) return;
#endif
  constexpr int MOST = 9;  // rows whose sums fit the registers
  thread_local Unpacked x;
  for (int64_t n = 0; n < cols; n += W) {
    read_tile(b, n, cols, x);
    make_starts(*b.words, x);
    int64_t m = 0;
    for (int64_t blocks = (rows + MOST - 1) / MOST; blocks; --blocks) {  // of nearly equal size
      const int64_t of_block = (rows - m + blocks - 1) / blocks;
      multiply_tile<MOST>(of_block, a + m * lda, lda, *b.words, x, std::min(W, cols - n),
                          out + m * ldo + n, ldo);
      m += of_block;
    }
  }
}

}  // namespace
#endif

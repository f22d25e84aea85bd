// Values of codes in models of bf16: weights times the scales of a segment are rounded within
// every tile of slots, and multiplied as two bytes with codes. One byte is too few: many small
// weights beside a large one would vanish.
//
// A lane holds the codes of four slots, and a vector W numbers of them. Codes that were unpacked
// once serve all weights of their latent.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "bytes.h"
#include "codes.h"
#include "packed.h"
#include "softmax.h"
#include "splits.h"
#include "tiles.h"

#ifdef MULTIPLIES_BYTES
namespace {

constexpr int64_t QUAD = 4;  // slots of a lane

// Weights of one segment as high and low bytes, (rows, 2, TILE)
struct RoundedWeights {
  std::vector<uint8_t> bytes;
  std::vector<float> peaks, scales;  // (rows,): the largest of p; and what a low byte stands for

  void begin(const float* p, int64_t rows, int64_t slots) {
    bytes.resize((rows + TILE_ROWS - 1) * 2 * TILE);  // tiles of 16 rows are read
    peaks.resize(rows);
    scales.resize(rows);
    for (int64_t m = 0; m < rows; ++m) peaks[m] = row_max(p + m * TILE, slots);
  }

  // p (rows, TILE) >= 0 times the scales of `slots` slots
  void round(const float* p, int64_t rows, const float* of_slots, int64_t slots) {
    constexpr float MOST = (1 << 2 * DIGITS) - 1;
    const float largest = row_max(of_slots, slots);
    for (int64_t m = 0; m < rows; ++m) {
      uint8_t *high = &bytes[m * 2 * TILE], *low = high + TILE;
      const float peak = peaks[m] * largest;
      scales[m] = peak / MOST;
      const V inverse(peak > 0.f ? MOST / peak : 0.f);
      for (int64_t t = 0; t < slots; t += W) {
        const int64_t n = std::min(W, slots - t);
        const Bytes x = to_integers(load(p + m * TILE + t, n) * load(of_slots + t, n) * inverse);
        store_bytes(down(x, DIGITS), high + t);
        store_bytes(x & repeat((1 << DIGITS) - 1), low + t);
      }
      std::memset(high + round_up(slots), 0, TILE - round_up(slots));
      std::memset(low + round_up(slots), 0, TILE - round_up(slots));
    }
  }
};

// out[m][i] = Σ_t weight[m][t] x[t][i], in low bytes, for M rows and n <= N vectors of codes
template <int M, int N>
void sum_quads(int64_t n, const uint8_t* weights, const Bytes* x, int64_t quads, V* out) {
  if constexpr (N > 1)
    if (n < N) return sum_quads<M, N - 1>(n, weights, x, quads, out);
  Bytes high[M][N], low[M][N];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < N; ++i) high[m][i] = low[m][i] = repeat(0);
  for (int64_t q = 0; q < quads; ++q, x += N)
    for (int m = 0; m < M; ++m) {
      const uint8_t* w = weights + m * 2 * TILE + q * QUAD;
      const Bytes of_high = repeat(word<4>(w)), of_low = repeat(word<4>(w + TILE));
      for (int i = 0; i < N; ++i) {
        high[m][i] = add_products(high[m][i], of_high, x[i]);
        low[m][i] = add_products(low[m][i], of_low, x[i]);
      }
    }
  constexpr float HIGH = 1 << DIGITS;
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < N; ++i)
      out[m * N + i] = at::vec::fmadd(to_floats(high[m][i]), V(HIGH), to_floats(low[m][i]));
}

// The third bits of numbers i to i + count of every quarter of a segment of 3 bits, a quarter's in
// bit 2 * quarter. p: their bytes, `eighth` of them, which hold the numbers of every eighth.
inline __m128i third_bits_of_row(const uint8_t* p, int64_t i, int64_t eighth, int64_t count) {
  const int64_t cut = std::clamp<int64_t>(eighth - i, 0, count);  // those of even eighths
  const __m128i even = load_bytes(p + i, cut);
  if (cut == count) return even;
  const __m128i odd = _mm_srli_epi16(load_bytes(p + i - eighth, cut, count), 1);
  return _mm_or_si128(even, _mm_and_si128(odd, _mm_set1_epi8(127)));
}

// The codes of `slots` slots in columns of bytes from `begin` up to `end` of a segment, all parts
// of W bytes after one another: x (quads, vectors). Returns the number of vectors.
template <int BITS>
int64_t unpack_quads(const Codes& v, const Segment& s, int64_t begin, int64_t end, int64_t slots,
                     Bytes* x) {
  const int64_t vectors = (end - begin + W - 1) / W * PARTS<BITS>;
  const uint8_t* p = v.codes + s.offset;
  const Bytes table = doubled_levels<BITS>();
  for (int64_t t = 0; t < slots; t += QUAD)
    for (int64_t i = begin; i < end; i += W) {
      const int64_t count = std::min(W, end - i);
      auto at = [&](int64_t j) { return p + std::min(t + j, slots - 1) * v.step; };
      const Bytes codes = quads([&](int64_t j) { return load_bytes(at(j) + i, count); });
      Bytes high = codes;
      if constexpr (BITS == 3)
        high = quads([&](int64_t j) {
          return third_bits_of_row(at(j) + s.width / 4, i, s.width / 8, count);
        });
      for (int part = 0; part < PARTS<BITS>; ++part)
        *x++ = signed_codes<BITS>(codes, high, part, table);
    }
  return vectors;
}

// out = keep * out + p v for a segment of codes, from column `first` of out on
template <int BITS>
void sum_segment(const RoundedWeights& weights, int64_t rows, const Codes& v, const Segment& s,
                 int64_t slots, const float* keep, float* out, int64_t ldo) {
  constexpr int64_t MOST = 4;
  constexpr int64_t STRIP = MOST / PARTS<BITS> * W;  // bytes of a slot
  const int64_t bytes = s.width / PARTS<BITS>;
  Bytes x[TILE / QUAD * MOST];
  for (int64_t begin = 0; begin < bytes; begin += STRIP) {
    const int64_t end = std::min(bytes, begin + STRIP);
    const int64_t n = unpack_quads<BITS>(v, s, begin, end, slots, x);
    auto add_vector = [&](int64_t m, int64_t i, V sum) {
      const int64_t byte = begin + i / PARTS<BITS> * W, some = std::min(W, end - byte);
      float* to = out + m * ldo + i % PARTS<BITS> * bytes + byte;
      const V scale(UNIT<BITS> * weights.scales[m]);
      at::vec::fmadd(sum, scale, load(to, some) * V(keep[m])).store(to, some);
    };
#ifdef MULTIPLIES_TILES
    TileSums sums;
    for (int64_t first = 0; rows >= LEAST_ROWS && first < rows; first += TILE_ROWS) {
      const uint8_t* high = &weights.bytes[first * 2 * TILE];
      for (int64_t i = 0; i < n; i += 2) {
        const int64_t vectors = std::min<int64_t>(2, n - i);
        multiply_tiles<false>({high, high + TILE, 2 * TILE, TILE_BYTES}, x + i, x + i + vectors - 1,
                              n, (slots + TILE_BYTES - 1) / TILE_BYTES, sums);
        for (int64_t m = first; m < std::min(rows, first + TILE_ROWS); ++m)
          for (int64_t j = 0; j < vectors; ++j) add_vector(m, i + j, sums.of(j, m - first));
      }
    }
    if (rows >= LEAST_ROWS) continue;
#endif
    auto add = [&](auto of_block, int64_t first) {
      constexpr int R = decltype(of_block)::value;
      V sums[R * MOST];
      sum_quads<R, MOST>(n, &weights.bytes[first * 2 * TILE], x, (slots + QUAD - 1) / QUAD, sums);
      for (int64_t m = 0; m < R; ++m)
        for (int64_t i = 0; i < n; ++i) add_vector(first + m, i, sums[m * n + i]);
    };
    constexpr int M = 2;
    int64_t m = 0;
    for (; m + M <= rows; m += M) add(std::integral_constant<int, M>(), m);
    for (; m < rows; ++m) add(std::integral_constant<int, 1>(), m);
  }
}

// The same for a segment of bf16
inline void sum_halves(const float* p, int64_t rows, const Codes& v, const Segment& s,
                       int64_t slots, const float* keep, float* out, int64_t ldo) {
  for (int64_t i = 0; i < s.width; i += W) {
    const int64_t count = std::min(W, s.width - i);
    V x[TILE];
    for (int64_t t = 0; t < slots; ++t) {
      const uint8_t* row = v.codes + t * v.step + s.offset;
      x[t] = load(reinterpret_cast<const at::BFloat16*>(row) + i, count);
    }
    for (int64_t m = 0; m < rows; ++m) {
      V sum = load(out + m * ldo + i, count) * V(keep[m]);
      for (int64_t t = 0; t < slots; ++t) sum = at::vec::fmadd(V(p[m * TILE + t]), x[t], sum);
      sum.store(out + m * ldo + i, count);
    }
  }
}

// The scales of slots, (segments, TILE), in memory `scales`
inline const float* scales_of(const Codes& v, int64_t slots, std::vector<float>& scales) {
  const int64_t count = v.packing->scales, room = v.room - (v.scales - v.codes);
  scales.resize((count + 3) / 4 * 4 * TILE);
  for (int64_t t = 0; t < slots; t += W)
    for (int64_t i = 0; i < count; i += 4) {
      Bytes columns[4];
      load_columns(v.scales + t * v.step + i, v.step, std::min(W, slots - t) - 1,
                   std::min<int64_t>(4, room - i), columns);
      for (int64_t j = 0; j < 4; ++j) {
        const Bytes code = down(columns[0], 8 * j) & repeat(255);
        scales_of(code).store(&scales[(i + j) * TILE + t]);
      }
    }
  return scales.data();
}

// out = keep * out + p v for the codes of `slots` <= TILE slots, p (rows, TILE), out (rows, width)
inline void weighted_sum(const float* p, int64_t rows, const Codes& v, int64_t slots,
                         const float* keep, float* out, int64_t ldo) {
  thread_local RoundedWeights weights;
  thread_local std::vector<float> scales;
#ifdef MULTIPLIES_TILES
  if (rows >= LEAST_ROWS) use_tiles(rows);
#endif
  weights.begin(p, rows, slots);
  const float* scale = scales_of(v, slots, scales);
  for (int64_t t = 0; t < slots; ++t) v.fetch(t + TILE);
  for (const Segment& s : v.packing->segments) {
    if (s.bits == 16) {
      sum_halves(p, rows, v, s, slots, keep, out, ldo);
    } else {
      weights.round(p, rows, scale, slots);
      scale += TILE;
      with_bits(s.bits, [&](auto bits) {
        if constexpr (bits != 16)
          sum_segment<bits>(weights, rows, v, s, slots, keep, out, ldo);
      });
    }
    out += s.width;
  }
}

}  // namespace
#endif

// Products of tiles of bytes and of bf16, where the processor has them (AMX). A tile holds 16 rows
// of 64 bytes. A lane of the right factor holds four bytes, or two numbers of bf16, that follow one
// another in the sums: vectors of bytes.h are the rows of such a tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bytes.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__) && defined(__AMX_INT8__) && \
    defined(__AMX_BF16__)
#define MULTIPLIES_TILES
#endif

namespace {

constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 64;

}  // namespace

#ifdef MULTIPLIES_TILES
namespace {

constexpr int64_t LEAST_ROWS = 5;  // for fewer, products of vectors are as fast or faster

// GCC does not know that what loads a tile reads memory, which must be written before
inline void finish_writes() { asm volatile("" ::: "memory"); }

// Gives this thread tiles: six of `rows` rows, for sums and left factors, and two of 16, for right
// ones. The fewer rows, the faster. The process must have asked for tiles: see cpu.py.
inline void use_tiles(int64_t rows) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int tile = 0; tile < 8; ++tile) {
    shapes.bytes[tile] = TILE_BYTES;
    shapes.rows[tile] = uint8_t(tile < 6 ? std::min(rows, TILE_ROWS) : TILE_ROWS);
  }
  finish_writes();
  _tile_loadconfig(&shapes);
}

// Takes the tiles of a thread away in the end
struct Tiles {
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
};

// Rows of numbers of two bytes each: `step` bytes from a row to the next, `next` to the next 64
// bytes of the same rows
struct TwoBytes {
  const uint8_t *high, *low;
  int64_t step, next;
};

// The sums of 16 rows with two vectors
struct alignas(64) TileSums {
  int high[2][TILE_ROWS][W], low[2][TILE_ROWS][W];

  V of(int vector, int64_t row) const {
    auto get = [&](auto& x) { return to_floats(_mm512_load_si512(x[vector][row])); };
    return at::vec::fmadd(get(high), V(1 << DIGITS), get(low));
  }
};

// Sums over 64 * depth bytes of 16 rows. SIGNED: high bytes have signs. b, c: the vectors, of which
// those for the next four bytes are `apart` vectors behind.
template <bool SIGNED>
inline void multiply_tiles(const TwoBytes& a, const Bytes* b, const Bytes* c, int64_t apart,
                           int64_t depth, TileSums& sums) {
  finish_writes();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < depth; ++i) {
    _tile_loadd(4, a.high + i * a.next, a.step);
    _tile_loadd(5, a.low + i * a.next, a.step);
    _tile_loadd(6, b + i * TILE_ROWS * apart, apart * sizeof *b);
    _tile_loadd(7, c + i * TILE_ROWS * apart, apart * sizeof *c);
    if constexpr (SIGNED) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
    } else {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
    }
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  constexpr int64_t STEP = W * sizeof(int);
  _tile_stored(0, sums.high[0], STEP);
  _tile_stored(1, sums.high[1], STEP);
  _tile_stored(2, sums.low[0], STEP);
  _tile_stored(3, sums.low[1], STEP);
}

// c (rows, columns) = a b for whole tiles of bf16: rows and columns are multiples of 16, and numbers
// of a row of a multiples of 32. b: numbers of two rows in a lane, (depth / 2, columns). Sizes and
// steps are in elements.
inline void multiply_halves(const at::BFloat16* a, int64_t rows, int64_t depth, const float* b,
                            int64_t columns, float* c) {
  constexpr int64_t DEPTH = TILE_BYTES / sizeof *a;
  const int64_t step = columns * sizeof *b, step_a = depth * sizeof *a;
  finish_writes();
  for (int64_t n = 0; n < columns; n += 2 * W)
    for (int64_t m = 0; m < rows; m += 2 * TILE_ROWS) {
      // the second of an odd number of tiles is the first once more
      const int64_t right = n + W < columns ? W : 0, below = m + TILE_ROWS < rows ? TILE_ROWS : 0;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t i = 0; i < depth; i += DEPTH) {
        const at::BFloat16* left = a + m * depth + i;
        const float* top = b + i / 2 * columns + n;
        _tile_loadd(4, left, step_a);
        _tile_loadd(5, left + below * depth, step_a);
        _tile_loadd(6, top, step);
        _tile_loadd(7, top + right, step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float* to = c + m * columns + n;
      _tile_stored(0, to, step);
      _tile_stored(1, to + right, step);
      _tile_stored(2, to + below * columns, step);
      _tile_stored(3, to + below * columns + right, step);
    }
}

}  // namespace
#endif

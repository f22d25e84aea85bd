// Queries of blocks of positions: rotated by the angles of a block, then multiplied with the map
// from latents to keys.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "tensors.h"
#include "tiles.h"
#include "vectors.h"
#include "weighted_sum.h"

namespace {

// In a model of T
template <class T>
class Absorber {
  using A = Factor<T>;
  using L = Lanes<A, A>;
  static constexpr int64_t HALF = sizeof(float) / sizeof(A);  // numbers in 32 bits

#ifdef MULTIPLIES_TILES
  static constexpr bool IN_TILES = std::is_same_v<A, at::BFloat16>;
#else
  static constexpr bool IN_TILES = false;
#endif
  static constexpr int64_t DEPTH = IN_TILES ? TILE_BYTES / sizeof(A) : 1;

  const int64_t D, R, tokens, heads, padded;  // heads: query heads of a kv head
  const int64_t depth;                        // D with the zeros that fill a tile
  const Tensor q, cos, sin, means;
  Tensor maps;  // (G, depth / HALF, padded), each HALF numbers that follow one another in D

 public:
  // q: (B, H, T, D); cos, sin: (B or 1, T, n, D / 2); up: (K, R, G / K * D); mean: (G, 1, D)
  Absorber(const Tensor& q, const Tensor& cos, const Tensor& sin, const Tensor& up,
           const OptionalTensor& mean)
      : D(q.size(3)),
        R(up.size(1)),
        tokens(q.size(2)),
        heads(q.size(1) / (up.size(0) * (up.size(2) / D))),
        padded(round_up(R)),
        depth((D + DEPTH - 1) / DEPTH * DEPTH),
        q(q.to(at::kFloat).contiguous()),
        cos(cos.contiguous()),
        sin(sin.contiguous()),
        means(mean ? mean->to(at::kFloat).contiguous() : Tensor()) {
    const Tensor from = up.to(c10::CppTypeToScalarType<A>::value).contiguous();
    const int64_t lifted = up.size(2) / D, G = up.size(0) * lifted, words = D / HALF;
    maps = at::zeros({G, depth / HALF, padded}, at::kFloat);
    at::parallel_for(0, G, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const float* x = static_cast<const float*>(from.const_data_ptr()) +
                         (g / lifted * R * lifted + g % lifted) * words;
        transpose(x, lifted * words, R, words, maps.data_ptr<float>() + g * maps.size(1) * padded);
      }
    });
  }

  int64_t width() const { return padded; }  // floats from a result to the next
  // Results behind the last one that are written as well, with what is no result
  static constexpr int64_t more() { return IN_TILES ? TILE_ROWS - 1 : 0; }

  // The results for kv head g of sequence b and n blocks from number `first` on, out (heads, T, n,
  // width()) and `more()`; and what the mean of the keys adds to their scores, added (heads, T, n)
  void operator()(int64_t b, int64_t g, int64_t first, int64_t n, float* out, float* added) const {
    const int64_t half = D / 2, rows = heads * tokens * n, blocks = cos.size(2);
    thread_local std::vector<float> rotated;
    thread_local std::vector<A> narrow;
    rotated.resize(rows * depth);
    narrow.resize((rows + more()) * depth);
    const int64_t angles = ((cos.size(0) == 1 ? 0 : b) * tokens * blocks + first) * half;
    const float* c = cos.const_data_ptr<float>() + angles;
    const float* s = sin.const_data_ptr<float>() + angles;
    const float* x = q.const_data_ptr<float>() + (b * q.size(1) + g * heads) * tokens * D;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t angle = (i / n % tokens * blocks + i % n) * half;
      const float *x0 = x + i / n * D, *x1 = x0 + half, *ci = c + angle, *si = s + angle;
      float *y0 = &rotated[i * depth], *y1 = y0 + half;
      for (int64_t j = 0; j < half; ++j) {
        y0[j] = x0[j] * ci[j] - x1[j] * si[j];
        y1[j] = x1[j] * ci[j] + x0[j] * si[j];
      }
      std::fill_n(y1 + half, depth - D, 0.f);
      if (means.defined())
        added[i] = std::inner_product(y0, y0 + D, means.const_data_ptr<float>() + g * D, 0.f);
    }
    at::vec::convert(rotated.data(), narrow.data(), rows * depth);
    const float* map = maps.const_data_ptr<float>() + g * maps.size(1) * padded;
#ifdef MULTIPLIES_TILES
    if constexpr (IN_TILES) {
      use_tiles(TILE_ROWS);
      multiply_halves(narrow.data(), (rows + more()) / TILE_ROWS * TILE_ROWS, depth, map, padded,
                      out);
      return;
    }
#endif
    auto get = [&](int64_t step, int64_t i) {
      const float* p = map + step * padded + i * W;
      if constexpr (std::is_same_v<typename L::X, V>)
        return load(p);
      else
        return _mm512_loadu_si512(p);
    };
    const float none[4] = {};
    std::fill_n(out, rows * padded, 0.f);
    weighted_sum_blocks<L>(
        narrow.data(), rows, depth, get, D, padded / W, [&](int64_t) { return none; }, out, padded);
  }

 private:
  // y (columns, padded) = x (rows, columns) with ldx floats from a row to the next, as bits
  void transpose(const float* x, int64_t ldx, int64_t rows, int64_t columns, float* y) const {
    for (int64_t i = 0; i < rows; i += W)
      for (int64_t j = 0; j < columns; j += W) {
        if (i + W <= rows && j + W <= columns) {
          at::vec::transpose_mxn<float, W, W>(x + i * ldx + j, ldx, y + j * padded + i, padded);
          continue;
        }
        for (int64_t m = i; m < std::min(rows, i + W); ++m)
          for (int64_t n = j; n < std::min(columns, j + W); ++n)
            std::memcpy(y + n * padded + m, x + m * ldx + n, sizeof *x);
      }
  }
};

}  // namespace

// Attention of one or a few new tokens, given a function that computes scores.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "bytes.h"
#include "cache.h"
#include "lanes.h"
#include "softmax.h"
#include "splits.h"
#include "tensors.h"
#include "tiles.h"
#include "vectors.h"
#include "weighted_bytes.h"
#include "weighted_sum.h"

namespace {

// Adds the bias to n scores of one head for the slots from t on of sequence b, which ends at `end`.
// bias: (B or 1, S); slopes: (H,). Without a bias, slopes multiply the distance to the last slot.
inline void add_bias(float* scores, int64_t n, const OptionalTensor& bias,
                     const OptionalTensor& slopes, int64_t b, int64_t head, int64_t t,
                     int64_t end) {
  const float slope = slopes ? slopes->const_data_ptr<float>()[head] : 1.f;
  if (bias) {
    const float* add = bias->const_data_ptr<float>() + t;
    if (bias->size(0) > 1) add += b * bias->size(1);
    for (int64_t i = 0; i < n; ++i) scores[i] += slope * add[i];
  } else if (slopes) {
    for (int64_t i = 0; i < n; ++i) scores[i] += slope * float(t + i - end + 1);
  }
}

// Adds the values of n slots from t on to the sums of a task's rows. weights: (rows, TILE); keep:
// (rows,), from Softmax::add; `narrow`: memory for a copy of the weights.
template <class T>
void add_values(const Cache& v, const Layout& layout, const Task& task, int64_t t, int64_t n,
                const std::vector<float>& weights, std::vector<Factor<T>>& narrow,
                const float* keep, float* sums) {
  const int64_t rows = layout.rows / layout.latents;  // of one latent
  if constexpr (!std::is_same_v<Factor<T>, float>) {
    narrow.resize(layout.rows * TILE);
    if (!v.packed) at::vec::convert(weights.data(), narrow.data(), layout.rows * TILE);
  }
  for (int64_t l = 0; l < layout.latents; ++l) {
    const int64_t first = l * rows, latent = task.unit * layout.latents + l;
#ifdef MULTIPLIES_BYTES
    if (v.packed && multiplies_bytes<T>) {
      weighted_sum(weights.data() + first * TILE, rows, v.codes(task.b, latent, t, n), n,
                   keep + first, sums + first * layout.padded, layout.padded);
      continue;
    }
#endif
    v.with_rows<T>(task.b, latent, t, n, [&](const auto& values) {
      using A = typename std::decay_t<decltype(values)>::Factor;
      const A* p;
      if constexpr (std::is_same_v<A, float>)
        p = weights.data();
      else
        p = narrow.data();
      weighted_sum(p + first * TILE, rows, TILE, values, n, keep + first,
                   sums + first * layout.padded, layout.padded);
    });
  }
}

// What is common to all ways of computing scores. q: (B, H, T, ...); keys: the number of key
// latents; span: (B or 1, 2). Every thread calls scorer() once; the result, called with a task, the
// first of n slots, n and out, writes unscaled scores to out (rows, TILE).
template <class T, class Scorer>
Tensor attend(const Tensor& q, int64_t keys, const Cache& v, const Tensor& span, double scale,
              const OptionalTensor& bias, const OptionalTensor& slopes, const Scorer& scorer) {
  const Layout layout(q, keys, v, multiplies_bytes<T>);
  const int64_t units = layout.units, rows = layout.rows, new_tokens = layout.new_tokens;
  const int64_t splits = count_splits(layout, span);
  const int64_t size = Softmax::numbers(rows, layout.padded);
  std::vector<float> parts(layout.batch * units * splits * size);

  at::parallel_for(0, layout.batch * units * splits, 1, [&](int64_t begin, int64_t end) {
#ifdef MULTIPLIES_TILES
    const Tiles tiles;
#endif
    auto compute_scores = scorer();
    std::vector<float> s(rows * TILE), keep(rows);
    std::vector<Factor<T>> narrow;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / splits / units, *bound = bounds(span, b);
      const int64_t each = ((bound[1] - bound[0] + splits - 1) / splits + TILE - 1) / TILE * TILE;
      const int64_t from = bound[0] + item % splits * each;
      const Task task{b, item / splits % units, from, std::min(bound[1], from + each)};
      Softmax softmax(&parts[item * size], rows, layout.padded);
      std::fill_n(softmax.peaks, rows, MASKED);
      for (int64_t t = task.begin; t < task.end; t += TILE) {
        const int64_t n = std::min(TILE, task.end - t);
        compute_scores(task, t, n, s.data());
        for (int64_t r = 0; r < rows; ++r) {
          float* row = &s[r * TILE];
          for (int64_t i = 0; i < n; ++i) row[i] *= float(scale);
          const int64_t head = task.unit * (rows / new_tokens) + r / new_tokens;
          add_bias(row, n, bias, slopes, task.b, head, t, bound[1]);
          const int64_t seen =
              bound[1] - new_tokens + r % new_tokens + 1 - t;  // up to the token's own slot
          for (int64_t i = std::max<int64_t>(0, seen); i < n; ++i) row[i] = MASKED;
          keep[r] = softmax.add(r, row, n);
        }
        add_values<T>(v, layout, task, t, n, s, narrow, keep.data(), softmax.sums);
      }
    }
  });

  Tensor out = at::empty({layout.batch, layout.heads, new_tokens, layout.width}, q.options());
  merge(parts, splits, layout, out.data_ptr<T>());
  return out;
}

}  // namespace

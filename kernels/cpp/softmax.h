// A softmax over slots that are read tile by tile (online softmax, arXiv 1805.02867).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>

#include "vectors.h"

namespace {

constexpr float MASKED = -std::numeric_limits<float>::infinity();  // the score of a hidden slot

inline float row_max(const float* s, int64_t n) {
  V most(MASKED);
  int64_t i = 0;
  for (; i + W <= n; i += W) most = at::vec::maximum(most, V::loadu(s + i));
  float lanes[W];
  most.store(lanes);
  float x = *std::max_element(lanes, lanes + W);
  for (; i < n; ++i) x = std::max(x, s[i]);
  return x;
}

// Replaces n scores by exp(score - peak) and returns their sum. Below MIN_EXPONENT the result is
// zero: arithmetic on subnormal numbers is a hundred times slower, and e^-64 times a million slots
// is still lost in the sum of a row.
constexpr float MIN_EXPONENT = -64;
inline float exp_row(float* s, int64_t n, float peak) {
  V total(0.f);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const V x = V::loadu(s + i) - V(peak);
    const V p = V::blendv(x.exp(), V(0.f), x < V(MIN_EXPONENT));
    p.store(s + i);
    total = total + p;
  }
  float lanes[W];
  total.store(lanes);
  float sum = std::accumulate(lanes, lanes + W, 0.f);
  for (; i < n; ++i) sum += s[i] = s[i] - peak < MIN_EXPONENT ? 0.f : std::exp(s[i] - peak);
  return sum;
}

// The softmax of several rows over the slots read so far. `sums` holds rows of `width` numbers: the
// values, weighted by exp(score - peak). `totals` holds the sums of these weights.
struct Softmax {
  static int64_t numbers(int64_t rows, int64_t width) { return rows * (width + 2); }

  float *sums, *peaks, *totals;

  // Lies in `memory`, which holds numbers(rows, width) floats
  Softmax(float* memory, int64_t rows, int64_t width)
      : sums(memory), peaks(sums + rows * width), totals(peaks + rows) {}

  // Replaces n more scores of row r by their weights. Returns the factor for what `sums` holds of
  // this row, because a higher peak shrinks earlier weights.
  float add(int64_t r, float* scores, int64_t n) {
    const float peak = std::max(peaks[r], row_max(scores, n));
    if (peak == MASKED) {  // no visible slot so far: infinities must not be subtracted
      std::fill_n(scores, n, 0.f);
      return 1.f;
    }
    const float keep = std::exp(peaks[r] - peak);
    totals[r] = totals[r] * keep + exp_row(scores, n, peak);
    peaks[r] = peak;
    return keep;
  }
};

}  // namespace

// How one call is divided among threads, and how their results are merged.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cache.h"
#include "softmax.h"
#include "tensors.h"
#include "vectors.h"

namespace {

constexpr int64_t TILE = 128;            // slots whose scores are held at once
constexpr int64_t MIN_SPLIT = 4 * TILE;  // slots worth a split of their own

// A unit is the smallest set of query heads that shares its latents with no other head. With K
// latents of keys and L of values there are gcd(K, L) units.
struct Task {
  int64_t b, unit;     // a sequence, and a unit of its heads
  int64_t begin, end;  // slots
};

// Sizes of one call, for queries q (B, H, T, ...)
struct Layout {
  int64_t batch, heads, new_tokens;
  int64_t units, rows, latents;   // rows (heads times new tokens) and value latents of a unit
  int64_t width, padded;          // of values: numbers, and floats of a sum
  const Packing* packing;         // of values whose sums are in the order of vectors, or null

  Layout(const Tensor& q, int64_t keys, const Cache& v, bool in_order)
      : batch(q.size(0)),
        heads(q.size(1)),
        new_tokens(q.size(2)),
        units(std::gcd(keys, v.latents())),
        rows(heads / units * new_tokens),
        latents(v.latents() / units),
        width(v.width()),
        padded(v.padded()),
        packing(v.packed && !in_order ? &v.packing : nullptr) {}

  // Where number j of a value is in a sum
  int64_t column(int64_t j) const { return packing ? packing->columns[j] : j; }
};

// The first slot of sequence b, and the one after its last, for span (B or 1, 2)
inline const int64_t* bounds(const Tensor& span, int64_t b) {
  return span.const_data_ptr<int64_t>() + (span.size(0) == 1 ? 0 : 2 * b);
}

// Into how many splits to cut the slots of a sequence: enough for about four tasks per thread, so
// that threads finish at nearly the same time
inline int64_t count_splits(const Layout& layout, const Tensor& span) {
  int64_t longest = 1;
  for (int64_t b = 0; b < layout.batch; ++b)
    longest = std::max(longest, bounds(span, b)[1] - bounds(span, b)[0]);
  const int64_t tasks = layout.batch * layout.units;
  const int64_t wanted = (4 * at::get_num_threads() + tasks - 1) / tasks;
  return std::max<int64_t>(1, std::min(wanted, longest / MIN_SPLIT));
}

// out (B, H, T, width) from the softmax of every split, stored one after another in `parts`
template <class T>
void merge(std::vector<float>& parts, int64_t splits, const Layout& layout, T* out) {
  const int64_t rows = layout.rows, width = layout.width;
  const int64_t size = Softmax::numbers(rows, layout.padded);
  at::parallel_for(0, layout.batch * layout.units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item)
      for (int64_t r = 0; r < rows; ++r) {
        float peak = MASKED, total = 0.f;
        auto part = [&](int64_t split) {
          return Softmax(&parts[(item * splits + split) * size], rows, layout.padded);
        };
        for (int64_t i = 0; i < splits; ++i) peak = std::max(peak, part(i).peaks[r]);
        std::vector<float> sum(layout.padded);
        for (int64_t i = 0; i < splits; ++i) {
          const Softmax x = part(i);
          const float weight = std::exp(x.peaks[r] - peak);
          total += weight * x.totals[r];
          for (int64_t j = 0; j < layout.padded; ++j)
            sum[j] += weight * x.sums[r * layout.padded + j];
        }
        for (int64_t j = 0; j < width; ++j)
          out[(item * rows + r) * width + j] = T(sum[layout.column(j)] / total);
      }
  });
}

}  // namespace

// What the ops expect of their arguments. They read memory by sizes, strides and spans without
// further checks, so whatever would be read wrongly, or from outside a tensor, raises an error here.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cache.h"
#include "tensors.h"

namespace {

inline void expect(bool holds, const char* what, const Tensor& x) {
  TORCH_CHECK(holds, "expected ", what, ", got sizes ", x.sizes(), ", strides ", x.strides(), ", ",
              x.scalar_type(), " on ", x.device());
}

// A tensor of this number of dimensions in this CPU's memory, none of them empty
inline void check_dense(const char* what, const Tensor& x, int64_t dimensions) {
  expect(x.device().is_cpu() && x.layout() == at::kStrided && x.dim() == dimensions &&
             x.numel() > 0 && !x.is_conj() && !x.is_neg(),
         what, x);
}

inline bool one_or(int64_t size, int64_t batch) { return size == 1 || size == batch; }

// A cache (B, L, S, R), or its rows (B, S, bytes), for queries q (B, H, T, ...), where L divides H,
// with slots up to `end`; with a table, pages in place of sequences
inline void check_cache(const char* what, const Cache& cache, const Tensor& q, int64_t end) {
  const Tensor& x = cache.x;
  check_dense(what, x, cache.packed ? 3 : 4);
  const int64_t last = x.dim() - 1;
  expect((cache.table || x.size(0) == q.size(0)) && q.size(1) % cache.latents() == 0 &&
             end <= cache.slots() && (x.stride(last) == 1 || x.size(last) == 1),
         what, x);
  if (cache.packed)
    expect(x.scalar_type() == at::kByte && x.size(2) >= cache.packing.nbytes(),
           "rows (B, S, bytes) in uint8, as long as their layout", x);
}

// A table of pages for each sequence of queries q. Entries that are not used may be anything.
inline void check_table(const Tensor& table, const Tensor& q, const Cache& keys,
                        const Cache& values, const Tensor& span) {
  expect(values.page() == keys.page() && values.x.size(0) == keys.x.size(0),
         "as many pages, as large, of values as of keys", values.x);
  const int64_t page = keys.page(), pages = keys.x.size(0);
  for (int64_t b = 0; b < q.size(0); ++b) {
    const int64_t* bound = span.const_data_ptr<int64_t>() + (span.size(0) == 1 ? 0 : 2 * b);
    const int* entry = table.const_data_ptr<int>() + b * table.size(1);
    for (int64_t i = bound[0] / page; i <= (bound[1] - 1) / page; ++i)
      TORCH_CHECK(0 <= entry[i] && entry[i] < pages, "the table has page ", entry[i],
                  " for slots from ", i * page, " on of sequence ", b, ", but there are ", pages,
                  " pages");
  }
}

// The arguments that all attention shares. Before any of them is read.
inline void check_attention(const Tensor& q, const Cache& keys, const Cache& values,
                            const Tensor& span, const OptionalTensor& bias,
                            const OptionalTensor& slopes) {
  check_dense("queries (B, H, T, R)", q, 4);
  const int64_t batch = q.size(0);
  const char* what = "a span (B or 1, 2) in int64, contiguous, of slots of the cache";
  check_dense(what, span, 2);
  expect(one_or(span.size(0), batch) && span.size(1) == 2 && span.scalar_type() == at::kLong &&
             span.is_contiguous(),
         what, span);
  int64_t last = 0;
  for (int64_t b = 0; b < span.size(0); ++b) {
    const int64_t* bound = span.const_data_ptr<int64_t>() + 2 * b;
    TORCH_CHECK(0 <= bound[0] && bound[0] < bound[1], "expected ", what, ", got ", bound[0], " to ",
                bound[1]);
    last = std::max(last, bound[1]);
  }
  if (keys.table) {
    const char* pages = "a table of pages (B, P) in int32, contiguous";
    check_dense(pages, *keys.table, 2);
    expect(keys.table->size(0) == batch && keys.table->scalar_type() == at::kInt &&
               keys.table->is_contiguous(),
           pages, *keys.table);
  }
  check_cache("keys (B, K, S, R), rows contiguous, K a divisor of H, S up to the span's end", keys,
              q, last);
  check_cache("values (B, L, S, W), rows contiguous, L a divisor of H, S up to the span's end",
              values, q, last);
  expect(values.slots() == keys.slots(), "as many slots of values as of keys", values.x);
  if (keys.table) check_table(*keys.table, q, keys, values, span);
  if (bias) {
    check_dense("a bias (B or 1, S)", *bias, 2);
    expect(one_or(bias->size(0), batch) && bias->size(1) == keys.slots() &&
               bias->is_contiguous() &&
               bias->scalar_type() == at::kFloat,
           "a bias (B or 1, S) in float32, contiguous", *bias);
  }
  if (slopes) {
    check_dense("slopes (H,)", *slopes, 1);
    expect(slopes->size(0) == q.size(1) && slopes->is_contiguous() &&
               slopes->scalar_type() == at::kFloat,
           "slopes (H,) in float32, contiguous", *slopes);
  }
}

// The position of every slot of the cache of latents, for each sequence
inline void check_positions(const Tensor& position, const Tensor& q, const Cache& latents) {
  check_dense("positions (B or 1, S)", position, 2);
  expect(one_or(position.size(0), q.size(0)) && position.size(1) == latents.slots() &&
             position.is_contiguous() && position.scalar_type() == at::kInt,
         "positions (B or 1, S) in int32, contiguous", position);
}

// Maps from latents of keys to heads, and cosines and sines for queries q (B, H, T, D), which differ
// among `angles` tokens
inline void check_rotation(const Tensor& q, const Cache& latents, const Tensor& up,
                           const OptionalTensor& mean, const Tensor& cos, const Tensor& sin,
                           int64_t angles) {
  const int64_t D = q.size(3), K = latents.latents();
  check_dense("maps (L, R, G / L * D)", up, 3);
  const int64_t G = up.size(2) / D * K;
  expect(up.size(0) == K && up.size(1) == latents.width() && up.size(2) % D == 0 && G > 0 &&
             q.size(1) % G == 0 && D % 2 == 0 && up.is_floating_point(),
         "maps (L, R, G / L * D), D even", up);
  if (mean) {
    check_dense("a mean (G, 1, D)", *mean, 3);
    expect(mean->size(0) == G && mean->size(1) == 1 && mean->size(2) == D &&
               mean->is_floating_point(),
           "a mean (G, 1, D)", *mean);
  }
  for (const Tensor& x : {cos, sin}) {
    check_dense("cosines and sines (B or 1, 1 or T, n, D / 2)", x, 4);
    expect(one_or(x.size(0), q.size(0)) && x.size(1) == angles && x.sizes() == cos.sizes() &&
               x.size(3) == D / 2 && x.scalar_type() == at::kFloat,
           "cosines and sines (B or 1, 1 or T, n, D / 2) in float32", x);
  }
}

}  // namespace

// Keys that are multiplied with queries as they are cached, and queries as these keys need them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "cache.h"
#include "multiply.h"
#include "rounded.h"
#include "tensors.h"

namespace {

#ifdef MULTIPLIES_BYTES
struct Keys : Cache {
  const Words words;

  Keys(const Tensor& x, const Layouts& layout, const OptionalTensor& table)
      : Cache(x, layout, table), words(packing) {}

  // Calls use(rows) with the rows of latent l in n slots from t on, in a model of T
  template <class T, class Use>
  void with_rows(int64_t b, int64_t l, int64_t t, int64_t n, const Use& use) const {
    if (!packed || !multiplies_bytes<T>) return Cache::with_rows<T>(b, l, t, n, use);
    use(RoundedCodes{codes(b, l, t, n), &words});
  }

  // What rows are multiplied with, for queries (..., R)
  template <class T>
  Tensor factors(const Tensor& q) const {
    if (!packed || !multiplies_bytes<T>) return Cache::factors<T>(q);
    const Tensor given = q.to(at::kFloat).contiguous();
    std::vector<int64_t> shape = q.sizes().vec();
    shape.back() = words.size;
    Tensor out = at::empty(shape, given.options().dtype(at::kInt));
    const float* from = given.const_data_ptr<float>();
    int* to = out.data_ptr<int>();
    at::parallel_for(0, given.numel() / width(), 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        round_query(from + i * width(), words, to + i * words.size);
    });
    return out;
  }
};
#else
using Keys = Cache;
#endif

}  // namespace

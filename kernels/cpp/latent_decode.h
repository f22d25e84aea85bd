// Queries that read latents directly: `latent_decode` in zoo/models/attention.py.
#pragma once

#include <cstdint>
#include <numeric>
#include <type_traits>

#include "attend.h"
#include "cache.h"
#include "checks.h"
#include "keys.h"
#include "tensors.h"

namespace {

Tensor latent_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& span,
                     double scale, const OptionalTensor& bias, const OptionalTensor& slopes,
                     const Layouts& k_layout, const Layouts& v_layout,
                     const OptionalTensor& table) {
  const Keys keys(k, k_layout, table);
  const Cache values(v, v_layout, table);
  check_attention(q, keys, values, span, bias, slopes);
  TORCH_CHECK(q.size(3) == keys.width(), "queries have ", q.size(3), " numbers, and keys ",
              keys.width());
  const int64_t K = keys.latents(), rows = q.size(1) / K * q.size(2);
  const int64_t latents = K / std::gcd(K, values.latents());  // of a unit
  return DISPATCH(q, "latent_decode", [&] {
    const Tensor queries = keys.factors<scalar_t>(q);
    const int64_t size = queries.size(3);
    auto score = [&](const Task& task, int64_t t, int64_t n, float* out) {
      for (int64_t i = 0; i < latents; ++i) {
        const int64_t l = task.unit * latents + i;
        keys.with_rows<scalar_t>(task.b, l, t, n, [&](const auto& latent) {
          using A = typename std::decay_t<decltype(latent)>::Factor;
          const A* a = queries.const_data_ptr<A>() + (task.b * K + l) * rows * size;
          multiply(a, rows, size, latent, n, out + i * rows * TILE, TILE);
        });
      }
    };
    return attend<scalar_t>(q, K, values, span, scale, bias, slopes, [&] { return score; });
  });
}

}  // namespace

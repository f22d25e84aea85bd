// Queries that read latents directly: `latent_decode` in zoo/models/attention.py.
#pragma once

#include <cstdint>
#include <numeric>
#include <type_traits>

#include "attend.h"
#include "cache.h"
#include "checks.h"
#include "multiply.h"
#include "tensors.h"

namespace {

Tensor latent_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& span,
                     double scale, const OptionalTensor& bias, const OptionalTensor& slopes,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const Cache keys{k, k_scale}, values{v, v_scale};
  check_attention(q, keys, values, span, bias, slopes);
  TORCH_CHECK(q.size(3) == keys.width(), "queries have ", q.size(3), " numbers, and keys ",
              keys.width());
  const int64_t K = k.size(1), rank = q.size(3), rows = q.size(1) / K * q.size(2);
  const int64_t latents = K / std::gcd(K, v.size(1));  // of a unit
  return DISPATCH(q, "latent_decode", [&] {
    const Tensor queries = q.to(keys.factor<scalar_t>()).contiguous();
    auto score = [&](const Task& task, int64_t t, int64_t n, float* out) {
      for (int64_t i = 0; i < latents; ++i) {
        const int64_t l = task.unit * latents + i;
        float* scores = out + i * rows * TILE;
        keys.with_rows<scalar_t>(task.b, l, t, [&](const auto* latent) {
          using A = Factor<std::decay_t<decltype(*latent)>>;
          const A* a = queries.const_data_ptr<A>() + (task.b * K + l) * rows * rank;
          multiply(a, rows, rank, latent, n, k.stride(2), k.size(3), scores, TILE);
        });
        keys.apply_scales(scores, rows, TILE, task.b, l, t, n);
      }
    };
    return attend<scalar_t>(q, K, values, span, scale, bias, slopes, [&] { return score; });
  });
}

}  // namespace

// Keys that are lifted from latents and rotated while they are read: `rotary_decode` in
// zoo/models/attention.py. Rotated keys stay in registers.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "attend.h"
#include "cache.h"
#include "checks.h"
#include "lift.h"
#include "packed.h"
#include "tensors.h"
#include "vectors.h"

namespace {

constexpr int64_t LIFTED = 32;  // slots whose keys are held at once

// out[r][j] = q[r] · rotate(keys[j] + mean) for M rows of q and n keys. q: (M, D); keys: (n, D),
// one every `ldk` floats; mean: (D,) or null; cos, sin: (n, D / 2), half = D / 2; out: rows of
// TILE.
template <int M>
void rotated_dot_products(const float* q, const float* keys, int64_t ldk, const float* mean,
                          const float* cos, const float* sin, int64_t half, int64_t n, float* out) {
  V sums[M * W];
  for (int64_t first = 0; first < n; first += W) {
    const int64_t slots = std::min(W, n - first);
    for (int64_t j = 0; j < slots; ++j) {
      const float *k = keys + (first + j) * ldk, *c = cos + (first + j) * half,
                  *s = sin + (first + j) * half;
      V sum[M];
      for (int r = 0; r < M; ++r) sum[r] = V(0.f);
      for (int64_t d = 0; d < half; d += W) {
        const int64_t count = std::min(W, half - d);
        V a = load(k + d, count), b = load(k + half + d, count);
        if (mean) a = a + load(mean + d, count), b = b + load(mean + half + d, count);
        const V x = load(c + d, count), y = load(s + d, count);
        const V rotated_a = a * x - b * y, rotated_b = b * x + a * y;
        for (int r = 0; r < M; ++r) {
          const float* p = q + r * 2 * half + d;
          sum[r] = at::vec::fmadd(load(p, count), rotated_a, sum[r]);
          sum[r] = at::vec::fmadd(load(p + half, count), rotated_b, sum[r]);
        }
      }
      for (int r = 0; r < M; ++r) sums[r * W + j] = sum[r];
    }
    for (int r = 0; r < M; ++r) horizontal_sums(sums + r * W).store(out + r * TILE + first, slots);
  }
}

// The same for any number of rows
inline void rotated_multiply(const float* q, int64_t rows, const float* keys, int64_t ldk,
                             const float* mean, const float* cos, const float* sin, int64_t half,
                             int64_t n, float* out) {
  int64_t r = 0;
  auto in_blocks_of = [&](auto count) {
    constexpr int M = decltype(count)::value;
    for (; r + M <= rows; r += M)
      rotated_dot_products<M>(q + r * 2 * half, keys, ldk, mean, cos, sin, half, n, out + r * TILE);
  };
  in_blocks_of(std::integral_constant<int, 4>());
  in_blocks_of(std::integral_constant<int, 1>());
}

// Writes latent l of n slots from t on to tile (n, rank), times their scales
template <class L, class T>
void unpack(const T* rows, const Cache& z, int64_t b, int64_t l, int64_t t, int64_t n,
            std::vector<float>& scales, L* tile) {
  scales.assign(n, 1.f);  // multiplied before rounding to L, as the definition does
  z.apply_scales(scales.data(), 1, n, b, l, t, n);
  const int64_t stored = z.x.size(3), rank = z.width();
  for_each_half(rows, stored, [&](const auto* numbers, int64_t first) {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t d = 0; d < stored; d += W) {
        const int64_t count = std::min(W, stored - d);
        const V x = load(numbers + j * z.x.stride(2) + d, count);
        store(x * V(scales[j]), &tile[j * rank + first + d], count);
      }
  });
}

Tensor rotary_decode(const Tensor& q, const Tensor& z, const Tensor& v, const Tensor& span,
                     double scale, const Tensor& cos, const Tensor& sin, const Tensor& up,
                     const OptionalTensor& mean, const OptionalTensor& bias,
                     const OptionalTensor& z_scale, const OptionalTensor& v_scale) {
  const Cache latent{z, z_scale}, values{v, v_scale};
  check_attention(q, latent, values, span, bias, std::nullopt);
  check_rotation(q, latent, up, mean, cos, sin);
  expect(cos.size(2) == z.size(2), "angles of all slots", cos);
  const int64_t D = q.size(3), half = D / 2, padded = round_up(D), rank = latent.width();
  const int64_t K = z.size(1), heads = up.size(2) / D, G = heads * K;  // kv heads of a latent, all
  const int64_t latents = K / std::gcd(K, v.size(1)), rows = q.size(1) / G * q.size(2);
  const Tensor queries = q.to(at::kFloat).contiguous();
  const Tensor means = mean ? mean->to(at::kFloat).contiguous() : Tensor();
  const Tensor c = cos.contiguous(), s = sin.contiguous();
  return DISPATCH(q, "rotary_decode", [&] {
    return with_lift_type<scalar_t>(rank, [&](auto number) {
      using L = decltype(number);
      const Tensor maps =
          pack_for_lift<L>(up.unflatten(2, {heads, D}).transpose(1, 2).flatten(0, 1));
      auto scorer = [&] {
        return [&, tile = std::vector<L>(), scales = std::vector<float>(),
                keys = std::vector<float>(LIFTED * padded)](const Task& task, int64_t t, int64_t n,
                                                            float* out) mutable {
          const int64_t angles = ((cos.size(0) == 1 ? 0 : task.b) * cos.size(2) + t) * half;
          for (int64_t i = 0; i < latents; ++i) {
            const int64_t l = task.unit * latents + i;
            const L* numbers = nullptr;
            int64_t step = z.stride(2);
            latent.with_rows<scalar_t>(task.b, l, t, [&](const auto* cached) {
              if constexpr (std::is_same_v<decltype(cached), const L*>) {
                // The product compiles a kernel per shape, so it always takes LIFTED rows: read in
                // place where so many are there, otherwise from a tile that has space for them
                if (n % LIFTED == 0) return void(numbers = cached);
              }
              tile.resize(TILE * rank);
              unpack(cached, latent, task.b, l, t, n, scales, tile.data());
              numbers = tile.data(), step = rank;
            });
            for (int64_t g = 0; g < heads; ++g) {
              const int64_t kv = l * heads + g;
              for (int64_t j = 0; j < n; j += LIFTED) {
                lift(numbers + j * step, LIFTED, step, maps.const_data_ptr<L>() + kv * rank * D,
                     rank, D, keys.data(), padded);
                rotated_multiply(queries.const_data_ptr<float>() + (task.b * G + kv) * rows * D,
                                 rows, keys.data(), padded,
                                 mean ? means.const_data_ptr<float>() + kv * D : nullptr,
                                 c.const_data_ptr<float>() + angles + j * half,
                                 s.const_data_ptr<float>() + angles + j * half, half,
                                 std::min(LIFTED, n - j), out + (i * heads + g) * rows * TILE + j);
              }
            }
          }
          at::native::cpublas::brgemm_release();
        };
      };
      return attend<scalar_t>(q, K, values, span, scale, bias, std::nullopt, scorer);
    });
  });
}

}  // namespace

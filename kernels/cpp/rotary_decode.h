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

// Writes n rows to tile (n, size), rounded to L
template <class L, class T>
void unpack(const Numbers<T>& rows, int64_t n, int64_t size, L* tile) {
  for (int64_t j = 0; j < n; ++j)
    for (int64_t d = 0; d < size; d += W) {
      const int64_t count = std::min(W, size - d);
      store(load(rows.x + j * rows.step + d, count), tile + j * size + d, count);
    }
}
template <class L>
void unpack(const Codes& rows, int64_t n, int64_t size, L* tile) {
  for (int64_t j = 0; j < n; ++j)
    rows.for_each_vector(j, 0, size / W,
                         [&](int64_t i, V x) { store(x, tile + j * size + i * W, W); });
}

Tensor rotary_decode(const Tensor& q, const Tensor& z, const Tensor& v, const Tensor& span,
                     double scale, const Tensor& cos, const Tensor& sin, const Tensor& up,
                     const OptionalTensor& mean, const OptionalTensor& bias,
                     const Layouts& z_layout, const Layouts& v_layout,
                     const OptionalTensor& table) {
  const Cache latent(z, z_layout, table), values(v, v_layout, table);
  check_attention(q, latent, values, span, bias, std::nullopt);
  check_rotation(q, latent, up, mean, cos, sin, 1);
  expect(cos.size(2) == latent.slots(), "angles of all slots", cos);
  const int64_t D = q.size(3), half = D / 2, padded = round_up(D);
  const int64_t K = latent.latents();
  const int64_t heads = up.size(2) / D, G = heads * K;  // kv heads of a latent, all
  const int64_t latents = K / std::gcd(K, values.latents()), rows = q.size(1) / G * q.size(2);
  const Tensor queries = q.to(at::kFloat).contiguous();
  const Tensor means = mean ? mean->to(at::kFloat).contiguous() : Tensor();
  const Tensor c = cos.contiguous(), s = sin.contiguous();
  // Maps read latents in the order of their rows
  const Tensor ordered =
      latent.packed ? latent.factors<float>(up.transpose(1, 2)).transpose(1, 2) : up;
  const int64_t size = ordered.size(1);
  return DISPATCH(q, "rotary_decode", [&] {
    return with_lift_type<scalar_t>(size, [&](auto number) {
      using L = decltype(number);
      const Tensor maps =
          pack_for_lift<L>(ordered.unflatten(2, {heads, D}).transpose(1, 2).flatten(0, 1));
      auto scorer = [&] {
        return [&, tile = std::vector<L>(), keys = std::vector<float>(LIFTED * padded)](
                   const Task& task, int64_t t, int64_t n, float* out) mutable {
          const int64_t angles = ((cos.size(0) == 1 ? 0 : task.b) * cos.size(2) + t) * half;
          for (int64_t i = 0; i < latents; ++i) {
            const int64_t l = task.unit * latents + i;
            const L* numbers = nullptr;
            int64_t step = size;
            latent.with_rows<scalar_t>(task.b, l, t, n, [&](const auto& cached) {
              if constexpr (std::is_same_v<std::decay_t<decltype(cached)>, Numbers<L>>) {
                // The product compiles a kernel per shape, so it always takes LIFTED rows: read in
                // place where so many are there, otherwise from a tile that has space for them
                if (n % LIFTED == 0) return void((numbers = cached.x, step = cached.step));
              }
              tile.resize(TILE * size);
              unpack(cached, n, size, tile.data());
              numbers = tile.data();
            });
            for (int64_t g = 0; g < heads; ++g) {
              const int64_t kv = l * heads + g;
              for (int64_t j = 0; j < n; j += LIFTED) {
                lift(numbers + j * step, LIFTED, step, maps.const_data_ptr<L>() + kv * size * D,
                     size, D, keys.data(), padded);
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

// Keys that are cached rotated within blocks of positions: `anchored_decode` in
// zoo/models/attention.py. Each block has queries of its own, absorbed into the latents before any
// slot is read.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "attend.h"
#include "cache.h"
#include "checks.h"
#include "keys.h"
#include "tensors.h"

namespace {

// Queries x (H, D), rotated by the angles of N blocks, cos and sin (N, D / 2): (H, N, D)
inline Tensor rotate_queries(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t H = x.size(0), half = x.size(1) / 2, N = cos.size(0);
  Tensor out = at::empty({H, N, 2 * half}, x.options());
  const float *q = x.const_data_ptr<float>(), *c = cos.const_data_ptr<float>(),
              *s = sin.const_data_ptr<float>();
  float* y = out.data_ptr<float>();
  at::parallel_for(0, H * N, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float *a = q + i / N * 2 * half, *b = a + half, *ci = c + i % N * half,
                  *si = s + i % N * half;
      for (int64_t j = 0; j < half; ++j) {
        y[i * 2 * half + j] = a[j] * ci[j] - b[j] * si[j];
        y[i * 2 * half + half + j] = b[j] * ci[j] + a[j] * si[j];
      }
    }
  });
  return out;
}

// The blocks of one sequence's slots
struct Blocks {
  int64_t size;
  const int* position;  // of every slot; null: it is the slot

  // The positions of sequence b in (B or 1, S)
  Blocks(int64_t size, const OptionalTensor& position, int64_t b) : size(size), position(nullptr) {
    if (!position) return;
    this->position = position->const_data_ptr<int>();
    if (position->size(0) > 1) this->position += b * position->size(1);
  }

  // How many blocks begin at or before the last position of the slots from `first` up to `end`
  int64_t count(int64_t first, int64_t end) const {
    if (!position) return (end - 1) / size + 1;
    const auto [least, most] = std::minmax_element(position + first, position + end);
    TORCH_CHECK(*least >= 0, "position ", *least, " is below 0");
    return *most / size + 1;
  }

  // Calls use(block, first slot, count) for each run of slots in one block, of n slots from t on
  template <class Use>
  void for_each_run(int64_t t, int64_t n, const Use& use) const {
    for (int64_t from = t; from < t + n;) {
      const int64_t b = (position ? position[from] : from) / size, next = (b + 1) * size;
      int64_t to = position ? from + 1 : std::min(t + n, next);
      while (position && to < t + n && b * size <= position[to] && position[to] < next) ++to;
      use(b, from, to - from);
      from = to;
    }
  }
};

struct BlockQueries {               // one tensor per sequence; G kv heads, N blocks
  std::vector<Tensor> absorbed;     // (G, H / G N, R)
  std::vector<Tensor> mean_scores;  // (G, H / G N, 1): what the mean of the keys adds, if any
};

inline BlockQueries make_block_queries(const Tensor& q, int64_t blocks, const Tensor& cos,
                                       const Tensor& sin, const Tensor& up,
                                       const OptionalTensor& mean) {
  const int64_t D = q.size(3), lifted = up.size(2) / D;  // kv heads of a latent
  const Tensor x = q.to(at::kFloat).contiguous();
  // One matrix product per kv head, in the dtype for which PyTorch's library is fastest
#ifdef CPU_CAPABILITY_AVX512
  const auto dtype = up.scalar_type();
#else
  const auto dtype = at::kFloat;
#endif
  const Tensor maps =  // (G, D, R)
      up.to(dtype).unflatten(2, {lifted, D}).permute({0, 2, 3, 1}).flatten(0, 1);
  BlockQueries out;
  for (int64_t b = 0; b < q.size(0); ++b) {
    const int64_t own = cos.size(0) == 1 ? 0 : b;
    const Tensor rotated =
        rotate_queries(x[b].squeeze(1), cos[own][0].narrow(0, 0, blocks).contiguous(),
                       sin[own][0].narrow(0, 0, blocks).contiguous())
            .view({up.size(0) * lifted, -1, D});
    out.absorbed.push_back(at::bmm(rotated.to(dtype), maps));
    if (mean)
      out.mean_scores.push_back(
          at::bmm(rotated, mean->to(at::kFloat).transpose(1, 2)).contiguous());
  }
  return out;
}

Tensor anchored_decode(const Tensor& q, const Tensor& z, const Tensor& v, const Tensor& span,
                       double scale, const Tensor& cos, const Tensor& sin, const Tensor& up,
                       const OptionalTensor& mean, int64_t block, const OptionalTensor& bias,
                       const OptionalTensor& position, const Layouts& z_layout,
                       const Layouts& v_layout) {
  const Keys keys(z, z_layout);
  const Cache values(v, v_layout);
  check_attention(q, keys, values, span, bias, std::nullopt);
  check_rotation(q, keys, up, mean, cos, sin);
  if (position) check_positions(*position, keys);
  const int64_t K = keys.latents(), rows = q.size(1) / K;
  const int64_t latents = K / std::gcd(K, values.latents());  // of a unit
  int64_t N = 0;  // blocks of the longest sequence
  for (int64_t b = 0; b < q.size(0); ++b) {
    const int64_t* bound = bounds(span, b);
    N = std::max(N, Blocks(block, position, b).count(bound[0], bound[1]));
  }
  TORCH_CHECK(N <= cos.size(2), "positions reach block ", N - 1, ", but only ", cos.size(2),
              " blocks have angles");
  BlockQueries queries = make_block_queries(q, N, cos, sin, up, mean);
  return DISPATCH(q, "anchored_decode", [&] {
    for (Tensor& u : queries.absorbed) u = keys.factors<scalar_t>(u);
    const int64_t size = queries.absorbed[0].size(2);
    auto score = [&](const Task& task, int64_t t, int64_t n, float* out) {
      const Blocks blocks(block, position, task.b);
      for (int64_t i = 0; i < latents; ++i) {
        const int64_t l = task.unit * latents + i;
        float* scores = out + i * rows * TILE;
        keys.with_rows<scalar_t>(task.b, l, t, [&](const auto& latent) {
          using A = typename std::decay_t<decltype(latent)>::Factor;
          const A* u = queries.absorbed[task.b].const_data_ptr<A>() + l * rows * N * size;
          blocks.for_each_run(t, n, [&](int64_t b, int64_t from, int64_t count) {
            multiply(u + b * size, rows, N * size, latent.skip(from - t), count, scores + from - t,
                     TILE);
          });
        });
        blocks.for_each_run(t, n, [&](int64_t b, int64_t from, int64_t count) {
          for (int64_t r = 0; mean && r < rows; ++r) {
            const Tensor& added = queries.mean_scores[task.b];
            const float add = added.const_data_ptr<float>()[(l * rows + r) * N + b];
            for (int64_t j = 0; j < count; ++j) scores[r * TILE + from - t + j] += add;
          }
        });
      }
    };
    return attend<scalar_t>(q, K, values, span, scale, bias, std::nullopt, [&] { return score; });
  });
}

}  // namespace

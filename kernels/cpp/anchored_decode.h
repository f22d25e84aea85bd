// Keys that are cached rotated within blocks of positions: `anchored_decode` in
// zoo/models/attention.py. Each block has queries of its own, which are absorbed into the latents
// just before its slots are read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "absorb.h"
#include "attend.h"
#include "cache.h"
#include "checks.h"
#include "keys.h"
#include "tensors.h"

namespace {

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

  // The first block of the slots from `first` up to `end`, and the last one
  std::pair<int64_t, int64_t> range(int64_t first, int64_t end) const {
    if (!position) return {first / size, (end - 1) / size};
    const auto [least, most] = std::minmax_element(position + first, position + end);
    TORCH_CHECK(*least >= 0, "position ", *least, " is below 0");
    return {*least / size, *most / size};
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

// Queries are absorbed for so many slots at once: reading the maps takes longer than a few products
constexpr int64_t AHEAD_SLOTS = 4 * TILE;

// Absorbed queries of blocks `first` up to `first` + `count`: (rows of a unit, count)
struct Ahead {
  int64_t b = 0, unit = 0, first = 0, count = 0;
  std::vector<float> queries, added;

  bool has(const Task& task, int64_t begin, int64_t last) const {
    return task.b == b && task.unit == unit && first <= begin && last < first + count;
  }
};

Tensor anchored_decode(const Tensor& q, const Tensor& z, const Tensor& v, const Tensor& span,
                       double scale, const Tensor& cos, const Tensor& sin, const Tensor& up,
                       const OptionalTensor& mean, int64_t block, const OptionalTensor& bias,
                       const OptionalTensor& position, const Layouts& z_layout,
                       const Layouts& v_layout, const OptionalTensor& table) {
  const Keys keys(z, z_layout, table);
  const Cache values(v, v_layout, table);
  check_attention(q, keys, values, span, bias, std::nullopt);
  check_rotation(q, keys, up, mean, cos, sin, q.size(2));
  if (position) {
    expect(q.size(2) == 1, "one new token, if there are positions", q);
    check_positions(*position, q, keys);
  }
  const int64_t K = keys.latents(), rows = q.size(1) / K * q.size(2);
  const int64_t latents = K / std::gcd(K, values.latents());  // of a unit
  const int64_t lifted = up.size(2) / q.size(3);  // kv heads of a latent
  for (int64_t b = 0; b < q.size(0); ++b) {
    const int64_t* bound = bounds(span, b);
    const int64_t last = Blocks(block, position, b).range(bound[0], bound[1]).second;
    TORCH_CHECK(last < cos.size(2), "positions reach block ", last, ", but only ", cos.size(2),
                " blocks have angles");
  }
  return DISPATCH(q, "anchored_decode", [&] {
    const Absorber<scalar_t> absorb(q, cos, sin, up, mean);
    const int64_t width = absorb.width();
    auto scorer = [&] {
      return [&, ahead = Ahead()](const Task& task, int64_t t, int64_t n, float* out) mutable {
        const Blocks blocks(block, position, task.b);
        const auto [begin, last] = blocks.range(t, t + n);
        if (!ahead.has(task, begin, last)) {
          const int64_t end = blocks.range(t, std::min(task.end, t + AHEAD_SLOTS)).second + 1;
          ahead.first = begin, ahead.count = end - begin;
          ahead.b = task.b, ahead.unit = task.unit;
          const int64_t size = rows / lifted * ahead.count;  // of a kv head
          ahead.queries.resize((latents * lifted * size + absorb.more()) * width);
          ahead.added.resize(latents * lifted * size);
          for (int64_t g = 0; g < latents * lifted; ++g)
            absorb(task.b, task.unit * latents * lifted + g, begin, ahead.count,
                   &ahead.queries[g * size * width], &ahead.added[g * size]);
        }
        for (int64_t i = 0; i < latents; ++i) {
          float* scores = out + i * rows * TILE;
          // What was absorbed for row r and block b
          auto place = [&, i](int64_t r, int64_t b) {
            return (i * rows + r) * ahead.count + b - ahead.first;
          };
          const int64_t l = task.unit * latents + i;
          keys.with_rows<scalar_t>(task.b, l, t, n, [&](const auto& latent) {
            using A = typename std::decay_t<decltype(latent)>::Factor;
            thread_local std::vector<A> u;
            const int64_t each = latent.factors();
            u.resize(rows * each);
            int64_t of = -1;  // the block of u
            blocks.for_each_run(t, n, [&](int64_t b, int64_t from, int64_t count) {
              for (int64_t r = 0; b != of && r < rows; ++r)
                latent.make_factors(&ahead.queries[place(r, b) * width], &u[r * each]);
              of = b;
              multiply(u.data(), rows, each, latent.skip(from - t), count, scores + from - t, TILE);
            });
          });
          blocks.for_each_run(t, n, [&](int64_t b, int64_t from, int64_t count) {
            for (int64_t r = 0; mean && r < rows; ++r)
              for (int64_t j = 0; j < count; ++j)
                scores[r * TILE + from - t + j] += ahead.added[place(r, b)];
          });
        }
      };
    };
    return attend<scalar_t>(q, K, values, span, scale, bias, std::nullopt, scorer);
  });
}

}  // namespace

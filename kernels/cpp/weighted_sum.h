// The product of weights with rows: what attention reads of the values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cache.h"
#include "lanes.h"
#include "packed.h"
#include "vectors.h"

namespace {

// out[m] = keep[m] out[m] + Σ_t p[m][t] v[t] for M rows and n <= N vectors. get(step, i) returns
// vector i of the DEPTH slots of a step.
template <int M, int N, class L, class A, class Get>
void add_weighted(int64_t n, const A* p, int64_t ldp, const Get& get, int64_t slots,
                  const float* keep, float* out, int64_t ldo) {
  if constexpr (N > 1)
    if (n < N) return add_weighted<M, N - 1, L>(n, p, ldp, get, slots, keep, out, ldo);
  V sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < N; ++i) sum[m][i] = V::loadu(out + m * ldo + i * W) * V(keep[m]);
  for (int64_t t = 0, step = 0; t < slots; t += L::DEPTH, ++step) {
    typename L::X y[N];
    for (int i = 0; i < N; ++i) y[i] = get(step, i);
    for (int m = 0; m < M; ++m) {
      const auto x = L::broadcast(p + m * ldp + t, slots - t);
      for (int i = 0; i < N; ++i) sum[m][i] = L::add(x, y[i], sum[m][i]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < N; ++i) sum[m][i].store(out + m * ldo + i * W);
}

// The same for any number of vectors, in parts of up to N
template <int M, class L, class A, class Get>
void weighted_sum_rows(const A* p, int64_t ldp, const Get& get, int64_t slots, int64_t vectors,
                       const float* keep, float* out, int64_t ldo) {
  constexpr int N = W == 16 ? (M == 4 ? 5 : 8) : M == 1 ? 8 : 8 / M;  // sums fit the registers
  int64_t i = 0;
  for (int64_t parts = (vectors + N - 1) / N; parts; --parts) {  // of nearly equal size
    const int64_t n = (vectors - i + parts - 1) / parts;
    auto get_part = [get, i](int64_t step, int64_t j) { return get(step, i + j); };
    add_weighted<M, N, L>(n, p, ldp, get_part, slots, keep, out + i * W, ldo);
    i += n;
  }
}

// The same for any number of rows. kept(m): the factors of the sums of rows from m on
template <class L, class A, class Get, class Kept>
void weighted_sum_blocks(const A* p, int64_t rows, int64_t ldp, const Get& get, int64_t slots,
                         int64_t vectors, const Kept& kept, float* out, int64_t ldo) {
  int64_t m = 0;
  auto in_blocks_of = [&](auto count) {
    constexpr int M = decltype(count)::value;
    for (; m + M <= rows; m += M)
      weighted_sum_rows<M, L>(p + m * ldp, ldp, get, slots, vectors, kept(m), out + m * ldo, ldo);
  };
  in_blocks_of(std::integral_constant<int, 4>());
  in_blocks_of(std::integral_constant<int, 2>());
  in_blocks_of(std::integral_constant<int, 1>());
}

// The vectors of rows v (slots, width) from `begin` to `end`: numbers as they are, codes unpacked
template <class T>
struct Columns {
  using L = Lanes<Factor<T>, T>;
  static constexpr bool IN_PLACE = L::DEPTH == 1;  // reading them twice costs nothing

  const Numbers<T>& v;
  int64_t begin, end;

  // Vector i of the DEPTH slots from t on, of which those below `slots` exist
  typename L::X get(int64_t t, int64_t i, int64_t slots) const {
    const int64_t first = (begin + i) * W;
    return L::column(v.x + t * v.step + first, v.step, slots - t, std::min(W, v.width - first));
  }

  // Writes those of slots `from` up to `to` to y
  void read(int64_t from, int64_t to, typename L::X* y) const {
    for (int64_t t = from; t < to; t += L::DEPTH)
      for (int64_t i = 0; i < end - begin; ++i) {
        for (int64_t k = 0; k < L::DEPTH; ++k)
          prefetch(v.x + (t + k + to - from) * v.step + (begin + i) * W);
        *y++ = get(t, i, to);
      }
  }
};
struct CodeColumns {
  using L = Lanes<float, float>;
  static constexpr bool IN_PLACE = false;

  const Codes& v;
  int64_t begin, end;

  void read(int64_t from, int64_t to, V* y) const {
    for (int64_t t = from; t < to; ++t) {
      v.fetch(t + v.ahead());
      v.for_each_vector(t, begin, end, [&](int64_t, V x) C10_ALWAYS_INLINE_ATTRIBUTE { *y++ = x; });
    }
  }
};
template <class T>
Columns<T> columns(const Numbers<T>& v, int64_t begin, int64_t end) {
  return {v, begin, end};
}
inline CodeColumns columns(const Codes& v, int64_t begin, int64_t end) { return {v, begin, end}; }

// out (rows, width) = keep (rows) * out + p (rows, slots) v, with v (slots, width). A row of out
// has space for whole vectors.
template <class A, class Rows>
void weighted_sum(const A* p, int64_t rows, int64_t ldp, const Rows& v, int64_t slots,
                  const float* keep, float* out, int64_t ldo) {
  constexpr int64_t BUFFER = 256;  // vectors: 16 KiB of AVX-512, 8 KiB of AVX2, so L1 holds them
  constexpr int64_t PANEL = BUFFER / 4;
  const float ones[4] = {1.f, 1.f, 1.f, 1.f};
  for (int64_t first = 0; first < v.vectors(); first += PANEL) {
    const auto x = columns(v, first, std::min(v.vectors(), first + PANEL));
    using L = typename std::decay_t<decltype(x)>::L;
    typename L::X buffer[BUFFER];
    const int64_t vectors = x.end - first;
    const int64_t strip = BUFFER / vectors * L::DEPTH;  // slots that fit the buffer
    float* to = out + first * W;
    for (int64_t t = 0; t < slots; t += strip) {
      const int64_t n = std::min(strip, slots - t);
      auto kept = [&](int64_t m) { return t ? ones : keep + m; };
      if constexpr (std::decay_t<decltype(x)>::IN_PLACE)
        if (rows == 1 && vectors <= 8) {  // one pass in the order of memory
          auto get = [&, t](int64_t step, int64_t i) { return x.get(t + step, i, slots); };
          weighted_sum_rows<1, L>(p + t, ldp, get, n, vectors, kept(0), to, ldo);
          continue;
        }
      x.read(t, t + n, buffer);  // in the order of memory, then used once per block of rows
      const typename L::X* filled = buffer;
      auto get = [=](int64_t step, int64_t i) { return filled[step * vectors + i]; };
      weighted_sum_blocks<L>(p + t, rows, ldp, get, n, vectors, kept, to, ldo);
    }
  }
}

}  // namespace

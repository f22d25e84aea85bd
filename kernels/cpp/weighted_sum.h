// The product of weights with rows: what attention reads of the values.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
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

// out (rows, width) = keep (rows) * out + p (rows, slots) v, with v (slots, width). A row of out
// has space for whole vectors.
template <class A, class T>
void weighted_sum(const A* p, int64_t rows, int64_t ldp, const T* v, int64_t slots, int64_t ldv,
                  int64_t width, const float* keep, float* out, int64_t ldo) {
  using L = Lanes<A, T>;
  constexpr int64_t BUFFER = 256;  // vectors: 16 KiB of AVX-512, 8 KiB of AVX2, so L1 holds them
  const float ones[4] = {1.f, 1.f, 1.f, 1.f};
  const int64_t panel = BUFFER / 4 * W;
  typename L::X buffer[BUFFER];
  for (int64_t first = 0; first < width; first += panel) {
    const int64_t size = std::min(width - first, panel), vectors = round_up(size) / W;
    const int64_t strip = BUFFER / vectors * L::DEPTH;  // slots that fit the buffer
    for (int64_t t = 0; t < slots; t += strip) {
      const int64_t n = std::min(strip, slots - t);
      const T* x = v + t * ldv + first;
      auto kept = [&](int64_t m) { return t ? ones : keep + m; };
      auto read = [=](int64_t step, int64_t i) {
        const int64_t j = step * L::DEPTH;
        return L::column(x + j * ldv + i * W, ldv, n - j, std::min(W, size - i * W));
      };
      if (rows == 1 && L::DEPTH == 1 && vectors <= 8) {  // one pass in the order of memory
        weighted_sum_rows<1, L>(p + t, ldp, read, n, vectors, kept(0), out + first, ldo);
        continue;
      }
      auto* y = buffer;  // filled in the order of memory, then read once per block of rows
      for (int64_t j = 0; j * L::DEPTH < n; ++j)
        for (int64_t i = 0; i < vectors; ++i) {
          for (int64_t k = 0; k < L::DEPTH; ++k)
            prefetch(x + (j * L::DEPTH + k + strip) * ldv + i * W);
          *y++ = read(j, i);
        }
      const typename L::X* filled = buffer;
      auto get = [=](int64_t step, int64_t i) { return filled[step * vectors + i]; };
      float* to = out + first;
      int64_t m = 0;
      for (; m + 4 <= rows; m += 4)
        weighted_sum_rows<4, L>(p + m * ldp + t, ldp, get, n, vectors, kept(m), to + m * ldo, ldo);
      if (m + 2 <= rows) {
        weighted_sum_rows<2, L>(p + m * ldp + t, ldp, get, n, vectors, kept(m), to + m * ldo, ldo);
        m += 2;
      }
      if (m < rows)
        weighted_sum_rows<1, L>(p + m * ldp + t, ldp, get, n, vectors, kept(m), to + m * ldo, ldo);
    }
  }
}

}  // namespace

// The product of rows with rows: scores from queries and keys, and linear layers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cache.h"
#include "lanes.h"
#include "packed.h"
#include "vectors.h"

namespace {

// sum[m] += a[m] · b for M rows of a and the first row of b
template <int M, class A, class T>
inline void add_products(const A* a, int64_t lda, const Numbers<T>& b, V* sum) {
  using L = Lanes<A, T>;
  auto accumulate = [&](int64_t i, int64_t count) {
    const auto y = L::right(b.x + i, count);
    for (int m = 0; m < M; ++m) sum[m] = L::add(L::left(a + m * lda + i, count), y, sum[m]);
  };
  int64_t i = 0;
  for (; i + L::COUNT <= b.width; i += L::COUNT) {
    if (M > 1 || sizeof(T) == 1) prefetch(b.x + i, AHEAD);
    accumulate(i, L::COUNT);
  }
  if (i < b.width) accumulate(i, b.width - i);
}
template <int M>
C10_ALWAYS_INLINE void add_products(const float* a, int64_t lda, const Codes& b, V* sum) {
  b.fetch(b.ahead());
  b.for_each_vector(0, 0, b.vectors(), [&](int64_t i, V y) C10_ALWAYS_INLINE_ATTRIBUTE {
    for (int m = 0; m < M; ++m)
      sum[m] = at::vec::fmadd(V::loadu(a + m * lda + i * W), y, sum[m]);
  });
}

// out[m][n] = a[m] · b[n] for M rows of a and N of b. Rows of b are read one after another, in the
// order of memory, because the processor prefetches in that order by itself.
template <int M, int N, class A, class Rows>
inline void dot_products(const A* a, int64_t lda, const Rows& b, float* out, int64_t ldo) {
  V sums[M * N];
  for (int n = 0; n < N; ++n) {
    V sum[M];
    for (auto& x : sum) x = V(0.f);
    add_products<M>(a, lda, b.skip(n), sum);
    for (int m = 0; m < M; ++m) sums[m * N + n] = sum[m];
  }
  if constexpr (M * N == W) {
    float all[W];
    horizontal_sums(sums).store(all);
    for (int m = 0; m < M; ++m) std::copy_n(all + m * N, N, out + m * ldo);
  } else {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        float x[W];
        sums[m * N + n].store(x);
        out[m * ldo + n] = std::accumulate(x, x + W, 0.f);
      }
  }
}

template <int M, class A, class Rows>
void multiply_rows(const A* a, int64_t lda, const Rows& b, int64_t cols, float* out, int64_t ldo) {
  constexpr int N = W / M;
  int64_t n = 0;
  for (; n + N <= cols; n += N) dot_products<M, N>(a, lda, b.skip(n), out + n, ldo);
  for (; n < cols; ++n) dot_products<M, 1>(a, lda, b.skip(n), out + n, ldo);
}

// out (rows, cols) = a (rows, size) bᵀ, with b (cols, size)
template <class A, class Rows>
void multiply(const A* a, int64_t rows, int64_t lda, const Rows& b, int64_t cols, float* out,
              int64_t ldo) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) multiply_rows<4>(a + m * lda, lda, b, cols, out + m * ldo, ldo);
  if (m + 2 <= rows) {
    multiply_rows<2>(a + m * lda, lda, b, cols, out + m * ldo, ldo);
    m += 2;
  }
  if (m < rows) multiply_rows<1>(a + m * lda, lda, b, cols, out + m * ldo, ldo);
}

}  // namespace

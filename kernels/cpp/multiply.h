// The product of rows with rows: scores from queries and keys, and linear layers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "lanes.h"
#include "vectors.h"

namespace {

// out[m][n] = a[m] · b[n] for M rows of a and N of b. Rows of b hold `size` elements; rows of a
// hold `size` numbers, or twice that for 4-bit codes. Rows of b are read one after another, in the
// order of memory, because the processor prefetches in that order by itself.
template <int M, int N, class A, class T>
inline void dot_products(const A* a, int64_t lda, const T* b, int64_t ldb, int64_t size, float* out,
                         int64_t ldo) {
  using L = Lanes<A, T>;
  V sums[M * N];
  for (int n = 0; n < N; ++n) {
    V sum[M];
    for (auto& x : sum) x = V(0.f);
    const T* row = b + n * ldb;
    auto accumulate = [&](int64_t i, int64_t count) {
      const auto y = L::right(row + i, count);
      for (int m = 0; m < M; ++m) sum[m] = L::add(L::left(a + m * lda + i, count), y, sum[m]);
      if constexpr (L::HALVES == 2) {
        const auto z = L::second(row + i, count);
        for (int m = 0; m < M; ++m)
          sum[m] = L::add(L::left(a + m * lda + size + i, count), z, sum[m]);
      }
    };
    int64_t i = 0;
    for (; i + L::COUNT <= size; i += L::COUNT) {
      if (M > 1 || sizeof(T) == 1) prefetch(row + i, AHEAD);
      accumulate(i, L::COUNT);
    }
    if (i < size) accumulate(i, size - i);
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

template <int M, class A, class T>
void multiply_rows(const A* a, int64_t lda, const T* b, int64_t cols, int64_t ldb, int64_t size,
                   float* out, int64_t ldo) {
  constexpr int N = W / M;
  int64_t n = 0;
  for (; n + N <= cols; n += N) dot_products<M, N>(a, lda, b + n * ldb, ldb, size, out + n, ldo);
  for (; n < cols; ++n) dot_products<M, 1>(a, lda, b + n * ldb, ldb, size, out + n, ldo);
}

// out (rows, cols) = a (rows, size) bᵀ, with b (cols, size)
template <class A, class T>
void multiply(const A* a, int64_t rows, int64_t lda, const T* b, int64_t cols, int64_t ldb,
              int64_t size, float* out, int64_t ldo) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4)
    multiply_rows<4>(a + m * lda, lda, b, cols, ldb, size, out + m * ldo, ldo);
  if (m + 2 <= rows) {
    multiply_rows<2>(a + m * lda, lda, b, cols, ldb, size, out + m * ldo, ldo);
    m += 2;
  }
  if (m < rows) multiply_rows<1>(a + m * lda, lda, b, cols, ldb, size, out + m * ldo, ldo);
}

}  // namespace

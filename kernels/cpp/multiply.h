// The product of rows with rows: scores from queries and keys, and linear layers.
#pragma once

#include <algorithm>
#include <cstdint>

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

// out (M, cols) = a (M, size) bᵀ. Rows of b are read one after another, in the order of memory,
// because the processor prefetches in that order by itself.
template <int M, class A, class Rows>
void multiply_rows(const A* a, int64_t lda, const Rows& b, int64_t cols, float* out, int64_t ldo) {
  for (int64_t n = 0; n < cols; n += W) {
    const int64_t count = std::min(W, cols - n);
    V sums[M][W];
    for (int64_t i = 0; i < count; ++i) {
      V sum[M];
      for (auto& x : sum) x = V(0.f);
      add_products<M>(a, lda, b.skip(n + i), sum);
      for (int m = 0; m < M; ++m) sums[m][i] = sum[m];
    }
    for (int m = 0; m < M; ++m) {
      for (int64_t i = count; i < W; ++i) sums[m][i] = V(0.f);
      horizontal_sums(sums[m]).store(out + m * ldo + n, count);
    }
  }
}

// The same for up to M rows
template <int M, class A, class Rows>
void multiply_few(int64_t rows, const A* a, int64_t lda, const Rows& b, int64_t cols, float* out,
                  int64_t ldo) {
  if constexpr (M > 1)
    if (rows < M) return multiply_few<M - 1>(rows, a, lda, b, cols, out, ldo);
  multiply_rows<M>(a, lda, b, cols, out, ldo);
}

// out (rows, cols) = a (rows, size) bᵀ, with b (cols, size), which is read once for up to MOST rows
template <class A, class Rows>
void multiply(const A* a, int64_t rows, int64_t lda, const Rows& b, int64_t cols, float* out,
              int64_t ldo) {
  constexpr int MOST = 9;  // sums that fit the registers
  int64_t m = 0;
  for (int64_t blocks = (rows + MOST - 1) / MOST; blocks; --blocks) {  // of nearly equal size
    const int64_t n = (rows - m + blocks - 1) / blocks;
    multiply_few<MOST>(n, a + m * lda, lda, b, cols, out + m * ldo, ldo);
    m += n;
  }
}

}  // namespace

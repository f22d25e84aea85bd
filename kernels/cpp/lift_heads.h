// Vectors of a few tokens times the matrix of their head, where PyTorch's batched product takes
// longer to begin than to multiply: `lift_heads` in zoo/models/attention.py.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// out (width,) = x (size,) times a matrix of T whose rows are `ld` apart
template <class T>
void lift_row(const T* x, const T* matrix, int64_t size, int64_t ld, int64_t width, T* out) {
  constexpr int64_t STRIP = 4;  // independent sums, to hide the latency of an addition
  for (int64_t first = 0; first < width; first += STRIP * W) {
    V sums[STRIP] = {V(0.f), V(0.f), V(0.f), V(0.f)};
    const int64_t count = std::min(STRIP * W, width - first);
    const T* row = matrix + first;
    for (int64_t i = 0; i < size; ++i, row += ld) {
      const V factor(float(x[i]));
      for (int64_t j = 0; j * W < count; ++j)
        sums[j] = at::vec::fmadd(factor, load(row + j * W, std::min(W, count - j * W)), sums[j]);
    }
    for (int64_t j = 0; j * W < count; ++j)
      store(sums[j], out + first + j * W, std::min(W, count - j * W));
  }
}

// y (B, H, T, R), up (L, R, G / L * width) -> (B, H, T, width)
Tensor lift_heads(const Tensor& y, const Tensor& up, int64_t width) {
  check_dense("vectors (B, H, T, R)", y, 4);
  check_dense("matrices (L, R, G / L * width)", up, 3);
  const int64_t heads = y.size(1), size = y.size(3), latents = up.size(0), ld = up.size(2);
  expect(up.is_contiguous() && up.scalar_type() == y.scalar_type() && up.size(1) == size &&
             width > 0 && ld % width == 0 && heads % (latents * (ld / width)) == 0,
         "contiguous matrices (L, R, G / L * width) for these vectors", up);
  if (y.size(0) * y.size(2) > few_rows(y)) {
    const int64_t shared = ld / width;
    const Tensor maps = up.unflatten(-1, {shared, width}).transpose(1, 2);
    const Tensor grouped = y.unflatten(1, {latents, shared, -1}).flatten(3, 4);
    return grouped.matmul(maps).unflatten(3, {-1, y.size(2)}).flatten(1, 3);
  }
  const Tensor x = y.contiguous();
  Tensor out = at::empty({y.size(0), heads, y.size(2), width}, y.options());
  const int64_t of_latent = heads / latents, of_matrix = of_latent / (ld / width);
  const int64_t rows = y.size(0) * heads * y.size(2);
  const int64_t least = std::max<int64_t>(1, (1 << 16) / (size * width));  // rows of a thread
  DISPATCH(y, "lift_heads", [&] {
    const scalar_t *from = x.const_data_ptr<scalar_t>(), *m = up.const_data_ptr<scalar_t>();
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, rows, least, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t head = r / y.size(2) % heads, column = head % of_latent / of_matrix * width;
        lift_row(from + r * size, m + head / of_latent * size * ld + column, size, ld, width,
                 to + r * width);
      }
    });
  });
  return out;
}

}  // namespace

// Linear layers for a few rows, where PyTorch's own product is far from what memory allows:
// `linear_decode` in zoo/models/linear.py.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cache.h"
#include "checks.h"
#include "lanes.h"
#include "multiply.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// out = scale * (x weightᵀ) + bias for the rows of x (B, 1, in), weight (out, in) of T
template <class T, class X>
void linear(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
            const OptionalTensor& bias, Tensor& out) {
  using A = Factor<T>;
  const int64_t size = weight.size(1), outputs = weight.size(0), rows = x.numel() / size;
  const Tensor converted = x.to(c10::CppTypeToScalarType<A>::value).contiguous();
  const A* a = converted.const_data_ptr<A>();
  const T* w = weight.const_data_ptr<T>();
  const float* scales = scale ? scale->const_data_ptr<float>() : nullptr;
  const X* biases = bias ? bias->const_data_ptr<X>() : nullptr;
  X* y = out.data_ptr<X>();
  // 4 KiB of each row stay in the L1 cache, and 256 KiB of weights in the L2 cache for all rows
  const int64_t part = rows > 2 ? 4096 / int64_t(sizeof(A)) : size;
  const int64_t block = std::max<int64_t>(W, (1 << 18) / int64_t(part * sizeof(T)) / W * W);
  at::parallel_for(0, (outputs + W - 1) / W, block / W, [&](int64_t begin, int64_t end) {
    std::vector<float> products(rows * block), sums(rows * block);
    for (int64_t j = begin * W; j < std::min(end * W, outputs); j += block) {
      const int64_t n = std::min({block, end * W - j, outputs - j}), ld = weight.stride(0);
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t i = 0; i < size; i += part) {
        const Numbers<T> some{w + j * ld + i, ld, std::min(part, size - i)};
        multiply(a + i, rows, size, some, n, products.data(), block);
        for (int64_t k = 0; k < rows * block; ++k) sums[k] += products[k];
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < n; ++i)
          y[r * outputs + j + i] = X(sums[r * block + i] * (scales ? scales[j + i] : 1.f) +
                                     (biases ? float(biases[j + i]) : 0.f));
    }
  });
}

Tensor linear_decode(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                     const OptionalTensor& bias) {
  check_dense("weights (out, in)", weight, 2);
  check_dense("rows (B, 1, in)", x, 3);
  expect(weight.stride(1) == 1 || weight.size(1) == 1, "weights whose rows are contiguous", weight);
  expect(x.size(1) == 1 && x.size(2) == weight.size(1), "rows (B, 1, in) for these weights", x);
  for (const OptionalTensor& each : {scale, bias}) {
    if (!each) continue;
    check_dense("a scale or bias (out,)", *each, 1);
    expect(each->size(0) == weight.size(0) && each->is_contiguous(),
           "a scale or bias (out,), contiguous", *each);
  }
  // Callers whose number of rows is not known when they are compiled leave the choice to this op
  if (x.size(0) > few_rows(x) && !scale && weight.scalar_type() == x.scalar_type())
    return at::linear(x, weight, bias ? *bias : Tensor());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor out = at::empty(shape, x.options());
  DISPATCH(x, "linear_decode", [&] {
    if (weight.scalar_type() == at::kChar)
      linear<int8_t, scalar_t>(x, weight, scale, bias, out);
    else
      linear<scalar_t, scalar_t>(x, weight, scale, bias, out);
  });
  return out;
}

}  // namespace

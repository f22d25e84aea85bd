// The keys or values of a cache: numbers, or rows of codes.
#pragma once

#include <ATen/ops/empty.h>
#include <c10/macros/Macros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>
#include <vector>

#include "lanes.h"
#include "packed.h"
#include "tensors.h"
#include "vectors.h"

namespace {

// Rows of numbers of one latent, from a slot on
template <class T>
struct Numbers {
  using Factor = ::Factor<T>;

  const T* x;
  int64_t step, width;  // numbers from a slot to the next, and of a slot

  int64_t vectors() const { return round_up(width) / W; }
  Numbers skip(int64_t slots) const { return {x + slots * step, step, width}; }

  // What queries of `width` numbers become: factors() of them
  int64_t factors() const { return width; }
  void make_factors(const float* query, Factor* y) const { at::vec::convert(query, y, width); }
};

// Copies n elements, 16 bytes at a time where there are so many: a call of memcpy takes longer
template <class T>
C10_ALWAYS_INLINE T* copy_few(const T* from, int64_t n, T* to) {
  constexpr int64_t N = 16 / sizeof(T);
  if (n < N) return std::copy_n(from, n, to);
  for (int64_t i = 0; i + N < n; i += N) std::memcpy(to + i, from + i, 16);
  std::memcpy(to + n - N, from + n - N, 16);
  return to + n;
}

struct Cache {
  const Tensor& x;  // (B, L, S, R), the last dimension contiguous; or rows (B, S, bytes)
  const OptionalTensor& table;  // (B, P): x has pages in place of sequences, and these are theirs
  const bool packed;
  const Packing packing;

  Cache(const Tensor& x, const Layouts& layout, const OptionalTensor& table)
      : x(x),
        table(table),
        packed(layout.has_value()),
        packing(layout ? Packing(*layout) : Packing()) {}

  // Only of a cache that was checked
  int64_t latents() const { return packed ? packing.heads : x.size(1); }
  int64_t page() const { return x.size(packed ? 1 : 2); }  // slots of a page, or of a sequence
  int64_t slots() const { return page() * (table ? table->size(1) : 1); }
  int64_t width() const { return packed ? packing.width : x.size(3); }
  int64_t padded() const { return packed ? packing.vectors * W : round_up(x.size(3)); }

  // The rows of latent l in n slots from t on, if they are packed
  Codes codes(int64_t b, int64_t l, int64_t t, int64_t n) const {
    const int64_t size = packing.code_bytes, first = l * size;
    const int64_t scales = packing.heads * size + l * packing.scales;
    const uint8_t* row = x.const_data_ptr<uint8_t>();
    if (in_line(b, t, n)) {
      row += place(b, t);
      return {&packing, row + first, row + scales, step(), x.size(2) - first};
    }
    const int64_t apart = (size + packing.scales + 15) / 16 * 16;
    const uint8_t* copy =
        copied<uint8_t>(b, t, n, {{row + first, size}, {row + scales, packing.scales}}, apart);
    return {&packing, copy, copy + size, apart, apart};
  }

  // Calls use(rows) with them, or with numbers, in a model of T
  template <class T, class Use>
  void with_rows(int64_t b, int64_t l, int64_t t, int64_t n, const Use& use) const {
    if (packed) return use(codes(b, l, t, n));
    const T* p = x.const_data_ptr<T>();  // raises an error where the dtype differs
    p += l * x.stride(1);
    Numbers<T> rows{p + place(b, t), step(), width()};
    if (!in_line(b, t, n)) rows = {copied<T>(b, t, n, {{p, width()}}, width()), width(), width()};
    use(rows);
  }

  // What rows are multiplied with, a (..., R), as they need it in a model of T: (..., R), or in the
  // order of codes, with zeros where they have none
  template <class T>
  Tensor factors(const Tensor& a) const {
    if (!packed) return a.to(c10::CppTypeToScalarType<Factor<T>>::value).contiguous();
    const Tensor given = a.to(at::kFloat).contiguous();
    std::vector<int64_t> shape = a.sizes().vec();
    shape.back() = padded();
    Tensor out = at::empty(shape, given.options());
    const float* from = given.const_data_ptr<float>();
    float* to = out.data_ptr<float>();
    const Codes codes{&packing, nullptr, nullptr, 0, 0};
    for (int64_t i = 0; i < given.numel(); i += width(), to += padded())
      codes.make_factors(from + i, to);
    return out;
  }

 private:
  int64_t step() const { return x.stride(packed ? 1 : 2); }  // elements from a slot to the next

  // Elements from the first of x to slot t of sequence b
  int64_t place(int64_t b, int64_t t) const {
    if (!table) return b * x.stride(0) + t * step();
    const int64_t entry = table->const_data_ptr<int>()[b * table->size(1) + t / page()];
    return entry * x.stride(0) + t % page() * step();
  }

  // Whether n slots from t on are one step apart, also where a page ends
  bool in_line(int64_t b, int64_t t, int64_t n) const {
    if (table)
      for (int64_t i = (t / page() + 1) * page(); i < t + n; i += page())
        if (place(b, i) != place(b, i - page()) + page() * step()) return false;
    return true;
  }

  // A copy of n slots from t on in memory of this thread, until the next copy. Of each slot, the
  // parts that begin at these pointers in the first slot of x, with their sizes; slots are `apart`
  // elements from one another. What the next copy will most likely read is prefetched.
  template <class T>
  const T* copied(int64_t b, int64_t t, int64_t n,
                  std::initializer_list<std::pair<const T*, int64_t>> parts, int64_t apart) const {
    thread_local std::vector<T> memory;
    memory.resize(std::max<size_t>(memory.size(), n * apart));
    T* to = memory.data();
    for (int64_t i = t; i < t + n;) {
      const int64_t end = std::min(t + n, (i / page() + 1) * page());
      int64_t from = place(b, i), next = place(b, std::min(i + n, slots() - 1));
      for (; i < end; ++i, from += step(), next += step(), to += apart) {
        T* at = to;
        for (const auto& [first, size] : parts) {
          for (int64_t j = 0; j < size; j += 64 / sizeof(T)) prefetch(first + next + j);
          at = copy_few(first + from, size, at);
        }
      }
    }
    return memory.data();
  }
};

}  // namespace

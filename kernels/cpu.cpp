// Decoding on a CPU: attention, for the definitions in zoo/attention.py, and linear layers of few
// rows, for zoo/linear.py. Everything is made of two products that stay in cache: `multiply` (rows by
// rows) and `mix` (weights by rows), on ATen's portable vectors. Memory is read once, in the dtype it
// is kept in; sums are fp32. What is packed in 8 or 4 bits is unpacked in registers, to fp32, which is
// faster than to bf16; a slot's scale then goes to its scores, and to the weights of its values.
// Keys are lifted by PyTorch's own product for one core, which knows AMX.
//
// B sequences, T new tokens, H query heads, K latents of keys, L of values, S slots. A unit is the
// least set of heads that shares its latents with no other: gcd(K, L) of them.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#define DISPATCH(x, name, ...)                                              \
  AT_DISPATCH_SWITCH((x).scalar_type(), name, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__)       \
                             AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using V = at::vec::Vectorized<float>;
constexpr int64_t W = V::size();
constexpr int64_t TILE = 128;  // slots whose scores are held at once
constexpr int64_t LIFTED = 32;  // slots whose keys are held at once
constexpr float NEVER = -std::numeric_limits<float>::infinity();

inline int64_t whole(int64_t width) { return (width + W - 1) / W * W; }  // of vectors

inline V load(const float* p) { return V::loadu(p); }
inline V load(const at::BFloat16* p) {
  V x;
  at::vec::load_fp32_from_bf16(p, x);
  return x;
}
inline V load(const at::Half* p) {
  V x;
  at::vec::load_fp32_from_fp16(p, x);
  return x;
}
// one of the two numbers of four bits in a byte: n stands for n - 7.5
template <int SHIFT>
struct Nibble {
  uint8_t pair;
  operator float() const { return float(pair >> SHIFT & 15) - 7.5f; }
};
#ifdef CPU_CAPABILITY_AVX512
inline __m128i bytes(const void* p, int64_t count) {
  return _mm_maskz_loadu_epi8(0xffffu >> (W - count), p);
}
inline V load(const int8_t* p, int64_t count = W) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(p, count)));
}
template <int SHIFT>
V load(const Nibble<SHIFT>* p, int64_t count = W) {
  const __m512 table = _mm512_setr_ps(-7.5f, -6.5f, -5.5f, -4.5f, -3.5f, -2.5f, -1.5f, -.5f, .5f, 1.5f,
                                      2.5f, 3.5f, 4.5f, 5.5f, 6.5f, 7.5f);
  const __m512i pairs = _mm512_cvtepu8_epi32(bytes(p, count));
  return _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, SHIFT), table);  // by the lowest four bits
}
#endif
struct Nibbles {  // both: those of the first half of a vector, and those of its second half
  uint8_t pair;
};
inline V load(const float* p, int64_t count) { return V::loadu(p, count); }
template <class T>
V load(const T* p, int64_t count) {  // the first numbers, zeros behind them
  if constexpr (sizeof(T) == 1) {
    float all[W] = {};
    std::copy_n(p, count, all);
    return V::loadu(all);
  } else {
    if (count == W) return load(p);
    alignas(32) T all[W] = {};
#ifdef CPU_CAPABILITY_AVX512
    if constexpr (sizeof(T) == 2) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(all), _mm256_maskz_loadu_epi16((1u << count) - 1, p));
      return load(all);
    }
#endif
    std::copy_n(p, count, all);
    return load(all);
  }
}

inline void store(V x, float* p, int64_t count) { x.store(p, count); }
inline void store(V x, at::BFloat16* p, int64_t count) {
  float near[W];
  x.store(near);
  at::vec::convert(near, p, count);
}

// Asks memory for what is read soon, behind what the processor fetches by itself while it reads in
// order without much arithmetic between; past the end it does nothing
constexpr int64_t AHEAD = 8192;  // bytes
inline void soon(const void* p, int64_t bytes = 0) {
  __builtin_prefetch(static_cast<const char*>(p) + bytes, 0, 2);
}

// How numbers of T are multiplied with numbers of A, DEPTH to a lane; HALVES of what lies at p
template <class A, class T>
struct Lanes {
  static constexpr int64_t DEPTH = 1, COUNT = W, HALVES = 1;
  using X = V;
  static V left(const A* p, int64_t count) { return load(p, count); }
  static V right(const T* p, int64_t count) { return load(p, count); }
  static V everywhere(const A* p, int64_t) { return V(float(*p)); }
  static V column(const T* p, int64_t, int64_t, int64_t count) { return load(p, count); }
  static V add(V a, V b, V sum) { return at::vec::fmadd(a, b, sum); }
};

// what T is multiplied with
#ifdef __AVX512BF16__
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, at::BFloat16>, at::BFloat16, float>;

template <>
struct Lanes<at::BFloat16, at::BFloat16> {  // pairs of bf16, sums in fp32
  static constexpr int64_t DEPTH = 2, COUNT = 2 * W, HALVES = 1;
  using X = __m512i;
  static X left(const at::BFloat16* p, int64_t count) { return right(p, count); }
  static X right(const at::BFloat16* p, int64_t count) {
    return count == COUNT ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  // numbers that stand side by side, and columns of rows that stand below one another
  static X everywhere(const at::BFloat16* p, int64_t rows) {
    return _mm512_set1_epi32(rows > 1 ? p[1].x << 16 | p[0].x : p[0].x);
  }
  static X column(const at::BFloat16* p, int64_t ld, int64_t rows, int64_t count) {
    X x = wide(p, count);
    return rows > 1 ? _mm512_or_si512(x, _mm512_slli_epi32(wide(p + ld, count), 16)) : x;
  }
  static X wide(const at::BFloat16* p, int64_t count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(0xffffu >> (W - count), p));
  }
  static V add(X a, X b, V sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#else
template <class T>
using Factor = float;
#endif

template <>
struct Lanes<float, Nibbles> : Lanes<float, float> {
  static constexpr int64_t HALVES = 2;
  static V right(const Nibbles* p, int64_t count) {
    return load(reinterpret_cast<const Nibble<0>*>(p), count);
  }
  static V second(const Nibbles* p, int64_t count) {
    return load(reinterpret_cast<const Nibble<4>*>(p), count);
  }
};

// what each of W vectors adds up to
inline V totals(const V* x) {
#ifdef CPU_CAPABILITY_AVX512
  __m512 y[W / 2], z[W / 4];  // halves of two, then of four vectors in one
  for (int i = 0; i < W / 2; ++i)
    y[i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]) + _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  for (int i = 0; i < W / 4; ++i) {
    const auto a = _mm512_castps_pd(y[2 * i]), b = _mm512_castps_pd(y[2 * i + 1]);
    z[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  }
  auto quarters = [](__m512 a, __m512 b) {
    return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  };
  return quarters(quarters(z[0], z[1]), quarters(z[2], z[3]));
#else
  float square[W * W], turned[W * W];
  for (int i = 0; i < W; ++i) x[i].store(square + i * W);
  at::vec::transpose_mxn<float, W, W>(square, W, turned, W);
  V total = V::loadu(turned);
  for (int i = 1; i < W; ++i) total = total + V::loadu(turned + i * W);
  return total;
#endif
}

// out[m][n] = a[m] · b[n] for M rows of a and N of b, `size` numbers long, or twice that where b
// lies in halves. One row of b after the other, in the order of memory: that is what the processor
// fetches ahead of by itself.
template <int M, int N, class A, class T>
inline void dots(const A* a, int64_t lda, const T* b, int64_t ldb, int64_t size, float* out,
                 int64_t ldo) {
  using L = Lanes<A, T>;
  V sums[M * N];
  for (int n = 0; n < N; ++n) {
    V sum[M];
    for (auto& x : sum) x = V(0.f);
    const T* row = b + n * ldb;
    auto take = [&](int64_t i, int64_t count) {
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
      if (M > 1 || sizeof(T) == 1) soon(row + i, AHEAD);
      take(i, L::COUNT);
    }
    if (i < size) take(i, size - i);
    for (int m = 0; m < M; ++m) sums[m * N + n] = sum[m];
  }
  if constexpr (M * N == W) {
    float all[W];
    totals(sums).store(all);
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
  for (; n + N <= cols; n += N) dots<M, N>(a, lda, b + n * ldb, ldb, size, out + n, ldo);
  for (; n < cols; ++n) dots<M, 1>(a, lda, b + n * ldb, ldb, size, out + n, ldo);
}

// out (rows, cols) = a (rows, size) bᵀ, b (cols, size)
template <class A, class T>
void multiply(const A* a, int64_t rows, int64_t lda, const T* b, int64_t cols, int64_t ldb,
              int64_t size, float* out, int64_t ldo) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) multiply_rows<4>(a + m * lda, lda, b, cols, ldb, size, out + m * ldo, ldo);
  if (m + 2 <= rows) multiply_rows<2>(a + m * lda, lda, b, cols, ldb, size, out + m * ldo, ldo), m += 2;
  if (m < rows) multiply_rows<1>(a + m * lda, lda, b, cols, ldb, size, out + m * ldo, ldo);
}

// out[m] = keep[m] out[m] + Σ_t p[m][t] v[t], for M rows and n <= N vectors, as v(step, i) gives them
// for the slots of a step
template <int M, int N, class L, class A, class Get>
void blend(int64_t n, const A* p, int64_t ldp, const Get& v, int64_t slots, const float* keep,
           float* out, int64_t ldo) {
  if constexpr (N > 1)
    if (n < N) return blend<M, N - 1, L>(n, p, ldp, v, slots, keep, out, ldo);
  V sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < N; ++i) sum[m][i] = V::loadu(out + m * ldo + i * W) * V(keep[m]);
  for (int64_t t = 0, step = 0; t < slots; t += L::DEPTH, ++step) {
    typename L::X y[N];
    for (int i = 0; i < N; ++i) y[i] = v(step, i);
    for (int m = 0; m < M; ++m) {
      const auto x = L::everywhere(p + m * ldp + t, slots - t);
      for (int i = 0; i < N; ++i) sum[m][i] = L::add(x, y[i], sum[m][i]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int i = 0; i < N; ++i) sum[m][i].store(out + m * ldo + i * W);
}

// the same for all vectors, in parts of up to N
template <int M, class L, class A, class Get>
void mix_rows(const A* p, int64_t ldp, const Get& v, int64_t slots, int64_t vectors,
              const float* keep, float* out, int64_t ldo) {
  constexpr int N = W == 16 ? (M == 4 ? 5 : 8) : M == 1 ? 8 : 8 / M;  // sums fit the registers
  int64_t i = 0;
  for (int64_t parts = (vectors + N - 1) / N; parts; --parts) {  // as even as they can be
    const int64_t n = (vectors - i + parts - 1) / parts;
    auto part = [v, i](int64_t step, int64_t j) { return v(step, i + j); };
    blend<M, N, L>(n, p, ldp, part, slots, keep, out + i * W, ldo);
    i += n;
  }
}

// out (rows, width) = keep (rows) * out + p (rows, slots) v, v (slots, width). out has room for
// whole vectors.
template <class A, class T>
void mix(const A* p, int64_t rows, int64_t ldp, const T* v, int64_t slots, int64_t ldv,
         int64_t width, const float* keep, float* out, int64_t ldo) {
  using L = Lanes<A, T>;
  constexpr int64_t ROOM = 256;  // 16 or 8 KB
  const float ones[4] = {1.f, 1.f, 1.f, 1.f};
  const int64_t panel = ROOM / 4 * W;
  typename L::X packed[ROOM];
  for (int64_t first = 0; first < width; first += panel) {
    const int64_t size = std::min(width - first, panel), vectors = whole(size) / W;
    const int64_t strip = ROOM / vectors * L::DEPTH;  // slots that stay near
    for (int64_t t = 0; t < slots; t += strip) {
      const int64_t n = std::min(strip, slots - t);
      const T* x = v + t * ldv + first;
      auto kept = [&](int64_t m) { return t ? ones : keep + m; };
      auto read = [=](int64_t step, int64_t i) {
        const int64_t j = step * L::DEPTH;
        return L::column(x + j * ldv + i * W, ldv, n - j, std::min(W, size - i * W));
      };
      if (rows == 1 && L::DEPTH == 1 && vectors <= 8) {  // in order as it is
        mix_rows<1, L>(p + t, ldp, read, n, vectors, kept(0), out + first, ldo);
        continue;
      }
      auto* y = packed;  // memory is read row after row
      for (int64_t j = 0; j * L::DEPTH < n; ++j)
        for (int64_t i = 0; i < vectors; ++i) {
          for (int64_t k = 0; k < L::DEPTH; ++k)
            soon(x + (j * L::DEPTH + k + strip) * ldv + i * W);
          *y++ = read(j, i);
        }
      const typename L::X* near = packed;
      auto get = [=](int64_t step, int64_t i) { return near[step * vectors + i]; };
      float* to = out + first;
      int64_t m = 0;
      for (; m + 4 <= rows; m += 4)
        mix_rows<4, L>(p + m * ldp + t, ldp, get, n, vectors, kept(m), to + m * ldo, ldo);
      if (m + 2 <= rows) {
        mix_rows<2, L>(p + m * ldp + t, ldp, get, n, vectors, kept(m), to + m * ldo, ldo);
        m += 2;
      }
      if (m < rows)
        mix_rows<1, L>(p + m * ldp + t, ldp, get, n, vectors, kept(m), to + m * ldo, ldo);
    }
  }
}

inline float largest(const float* s, int64_t n) {
  V most(NEVER);
  int64_t i = 0;
  for (; i + W <= n; i += W) most = at::vec::maximum(most, V::loadu(s + i));
  float parts[W];
  most.store(parts);
  float x = *std::max_element(parts, parts + W);
  for (; i < n; ++i) x = std::max(x, s[i]);
  return x;
}

// p = exp(scores - peak) in place, a row of n; returns their sum. What is next to nothing is nothing:
// numbers too small to be normal take a hundred times as long.
constexpr float LEAST = -64;  // e^LEAST times a million is still lost in the sum of a row
inline float soften(float* s, int64_t n, float peak) {
  V total(0.f);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const V x = V::loadu(s + i) - V(peak);
    const V p = V::blendv(x.exp(), V(0.f), x < V(LEAST));
    p.store(s + i);
    total = total + p;
  }
  float parts[W];
  total.store(parts);
  float sum = std::accumulate(parts, parts + W, 0.f);
  for (; i < n; ++i) sum += s[i] = s[i] - peak < LEAST ? 0.f : std::exp(s[i] - peak);
  return sum;
}

struct Task {  // what a thread is at: a sequence, and a unit of its heads
  int64_t b, unit;
};

struct Kept {  // keys or values of a cache (B, L, S, R): numbers, or codes with a scale a vector
  const Tensor& x;
  const Maybe& scale;

  bool nibbles() const { return x.scalar_type() == at::kByte; }
  int64_t width() const { return x.size(3) * (nibbles() ? 2 : 1); }
  template <class T>
  at::ScalarType factor() const {  // what it is multiplied with, in a model of T
    return scale ? at::kFloat : c10::CppTypeToScalarType<Factor<T>>::value;
  }
  template <class T>
  const T* at(int64_t b, int64_t l, int64_t t) const {
    const T* p;
    if constexpr (std::is_same_v<T, Nibbles>)
      p = reinterpret_cast<const T*>(x.const_data_ptr<uint8_t>());
    else
      p = x.const_data_ptr<T>();  // refuses another dtype
    return p + b * x.stride(0) + l * x.stride(1) + t * x.stride(2);
  }
  // rows of n slots from t on, times the scales of latent l
  void weigh(float* s, int64_t rows, int64_t ld, int64_t b, int64_t l, int64_t t, int64_t n) const {
    if (!scale) return;
    const int64_t step = scale->stride(2);
    const auto* p = scale->const_data_ptr<at::BFloat16>() + b * scale->stride(0) +
                    l * scale->stride(1) + t * step;
    at::BFloat16 near[W] = {};
    for (int64_t i = 0; i < n; i += W) {
      const int64_t count = std::min(W, n - i);
      for (int64_t j = 0; j < count; ++j) near[j] = p[(i + j) * step];
      const V x = load(near);
      for (int64_t r = 0; r < rows; ++r) (load(s + r * ld + i, count) * x).store(s + r * ld + i, count);
    }
  }
};

// use(rows) for the slots from t on of latent l
template <class T, class Use>
void with_rows(const Kept& kept, int64_t b, int64_t l, int64_t t, const Use& use) {
  if (!kept.scale)
    use(kept.at<T>(b, l, t));
  else if (kept.nibbles())
    use(kept.at<Nibbles>(b, l, t));
  else
    use(kept.at<int8_t>(b, l, t));
}

// use(rows, first) for the halves of packed pairs, `first` being where one begins, or once for all
template <class T, class Use>
void with_halves(const T* rows, int64_t size, const Use& use) {
  if constexpr (std::is_same_v<T, Nibbles>) {
    use(reinterpret_cast<const Nibble<0>*>(rows), 0);
    use(reinterpret_cast<const Nibble<4>*>(rows), size);
  } else {
    use(rows, 0);
  }
}

// Everything but the scores. What `scorer()` returns is a thread's own: called with a task, the first
// of n slots, n and out, it fills out (rows, TILE).
template <class T, class Scorer>
Tensor attend(const Tensor& q, int64_t keys, const Kept& v, const Tensor& span, double scale,
              const Maybe& bias, const Maybe& slopes, const Scorer& scorer) {
  const int64_t B = q.size(0), H = q.size(1), news = q.size(2);
  const int64_t L = v.x.size(1), width = v.width(), side = v.x.size(3);
  const int64_t room = v.nibbles() ? 2 * whole(side) : whole(width);  // halves lie apart
  const int64_t units = std::gcd(keys, L), rows = H / units * news, latents = L / units;
  Tensor out = at::empty({B, H, news, width}, q.options());
  const int64_t* ends = span.const_data_ptr<int64_t>();
  auto bounds = [&](int64_t b) { return ends + (span.size(0) == 1 ? 0 : 2 * b); };
  int64_t longest = 1;
  for (int64_t b = 0; b < B; ++b) longest = std::max(longest, bounds(b)[1] - bounds(b)[0]);
  const int64_t wanted = (4 * at::get_num_threads() + B * units - 1) / (B * units);
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, longest / 512));
  const int64_t part = rows * (room + 2);  // sums, then peaks, then totals
  std::vector<float> parts(B * units * splits * part);

  at::parallel_for(0, B * units * splits, 1, [&](int64_t begin, int64_t end) {
    auto scores = scorer();
    std::vector<float> s(rows * TILE), keep(rows);
    std::vector<Factor<T>> narrow;  // of s, where that is not what values are multiplied with
    for (int64_t item = begin; item < end; ++item) {
      const Task task{item / splits / units, item / splits % units};
      const int64_t split = item % splits, *bound = bounds(task.b);
      const int64_t each = ((bound[1] - bound[0] + splits - 1) / splits + TILE - 1) / TILE * TILE;
      const int64_t from = bound[0] + split * each, to = std::min(bound[1], from + each);
      float *sums = &parts[item * part], *peaks = sums + rows * room, *totals = peaks + rows;
      std::fill_n(peaks, rows, NEVER);
      for (int64_t t = from; t < to; t += TILE) {
        const int64_t n = std::min(TILE, to - t);
        scores(task, t, n, s.data());
        for (int64_t r = 0; r < rows; ++r) {
          float* row = &s[r * TILE];
          for (int64_t i = 0; i < n; ++i) row[i] *= float(scale);
          const int64_t head = task.unit * (rows / news) + r / news;
          const float slope = slopes ? slopes->const_data_ptr<float>()[head] : 1.f;
          if (bias) {
            const float* add = bias->const_data_ptr<float>() + t;
            if (bias->size(0) > 1) add += task.b * bias->size(1);
            for (int64_t i = 0; i < n; ++i) row[i] += slope * add[i];
          } else if (slopes) {
            for (int64_t i = 0; i < n; ++i) row[i] += slope * float(t + i - bound[1] + 1);
          }
          const int64_t seen = bound[1] - news + r % news + 1 - t;  // none behind the token itself
          for (int64_t i = std::max<int64_t>(0, seen); i < n; ++i) row[i] = NEVER;
          const float peak = std::max(peaks[r], largest(row, n));
          if (peak == NEVER) {  // nothing seen so far
            std::fill_n(row, n, 0.f);
            keep[r] = 1.f;
            continue;
          }
          keep[r] = std::exp(peaks[r] - peak);
          totals[r] = totals[r] * keep[r] + soften(row, n, peak);
          peaks[r] = peak;
        }
        for (int64_t l = 0; l < latents; ++l)
          v.weigh(&s[l * (rows / latents) * TILE], rows / latents, TILE, task.b,
                  task.unit * latents + l, t, n);
        if constexpr (!std::is_same_v<Factor<T>, float>) {
          narrow.resize(rows * TILE);
          if (!v.scale) at::vec::convert(s.data(), narrow.data(), rows * TILE);
        }
        for (int64_t l = 0; l < latents; ++l) {
          const int64_t first = l * (rows / latents);
          with_rows<T>(v, task.b, task.unit * latents + l, t, [&](const auto* values) {
            with_halves(values, side, [&](const auto* half, int64_t column) {
              using A = Factor<std::decay_t<decltype(*half)>>;
              const A* weights;
              if constexpr (std::is_same_v<A, float>)
                weights = s.data();
              else
                weights = narrow.data();
              mix(weights + first * TILE, rows / latents, TILE, half, n, v.x.stride(2), side,
                  &keep[first], sums + first * room + (column ? whole(side) : 0), room);
            });
          });
        }
      }
    }
  });

  T* y = out.data_ptr<T>();
  at::parallel_for(0, B * units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item)
      for (int64_t r = 0; r < rows; ++r) {
        float peak = NEVER, total = 0.f;
        auto at = [&](int64_t split) { return &parts[(item * splits + split) * part]; };
        for (int64_t i = 0; i < splits; ++i) peak = std::max(peak, at(i)[rows * room + r]);
        std::vector<float> sum(width);
        for (int64_t i = 0; i < splits; ++i) {
          const float* p = at(i);
          const float weight = std::exp(p[rows * room + r] - peak);
          total += weight * p[rows * (room + 1) + r];
          for (int64_t j = 0; j < width; ++j)
            sum[j] += weight * p[r * room + (j < side ? j : whole(side) + j - side)];
        }
        for (int64_t j = 0; j < width; ++j) y[(item * rows + r) * width + j] = T(sum[j] / total);
      }
  });
  return out;
}

Tensor latent_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& span,
                     double scale, const Maybe& bias, const Maybe& slopes, const Maybe& k_scale,
                     const Maybe& v_scale) {
  const Kept keys{k, k_scale}, values{v, v_scale};
  const int64_t K = k.size(1), rank = q.size(3), rows = q.size(1) / K * q.size(2);
  const int64_t latents = K / std::gcd(K, v.size(1));
  return DISPATCH(q, "latent_decode", [&] {
    const Tensor x = q.to(keys.factor<scalar_t>()).contiguous();
    auto scores = [&](const Task& task, int64_t t, int64_t n, float* out) {
      for (int64_t i = 0; i < latents; ++i) {
        const int64_t l = task.unit * latents + i;
        float* found = out + i * rows * TILE;
        with_rows<scalar_t>(keys, task.b, l, t, [&](const auto* latent) {
          using A = Factor<std::decay_t<decltype(*latent)>>;
          const A* a = x.const_data_ptr<A>() + (task.b * K + l) * rows * rank;
          multiply(a, rows, rank, latent, n, k.stride(2), k.size(3), found, TILE);
        });
        keys.weigh(found, rows, TILE, task.b, l, t, n);
      }
    };
    return attend<scalar_t>(q, K, values, span, scale, bias, slopes, [&] { return scores; });
  });
}

// Queries x (H, D) turned by the angles of N blocks, cos and sin (N, D / 2): (H, N, D)
Tensor turn(const Tensor& x, const Tensor& cos, const Tensor& sin) {
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

Tensor anchored_decode(const Tensor& q, const Tensor& z, const Tensor& v, const Tensor& span,
                       double scale, const Tensor& cos, const Tensor& sin, const Tensor& up,
                       const Maybe& mean, int64_t block, const Maybe& bias, const Maybe& z_scale,
                       const Maybe& v_scale) {
  const Kept keys{z, z_scale}, values{v, v_scale};
  const Tensor x = q.to(at::kFloat).contiguous();
  const int64_t B = q.size(0), H = q.size(1), D = q.size(3), K = z.size(1), rank = keys.width();
  const int64_t shared = up.size(2) / D, latents = K / std::gcd(K, v.size(1)), rows = H / K;
  const int64_t N = (span.select(1, 1).max().item<int64_t>() + block - 1) / block;
  // (G, D, R), one product of a library for every kv head: low precision where it has hardware
#ifdef CPU_CAPABILITY_AVX512
  const auto exact = up.scalar_type();
#else
  const auto exact = at::kFloat;
#endif
  const Tensor maps =
      up.to(exact).unflatten(2, {shared, D}).permute({0, 2, 3, 1}).flatten(0, 1);
  std::vector<Tensor> u, added;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t own = cos.size(0) == 1 ? 0 : b;
    const Tensor turned = turn(x[b].squeeze(1), cos[own][0].narrow(0, 0, N).contiguous(),
                               sin[own][0].narrow(0, 0, N).contiguous())
                              .view({K * shared, -1, D});
    u.push_back(at::bmm(turned.to(exact), maps));  // (G, H / G N, R)
    if (mean) added.push_back(at::bmm(turned, mean->to(at::kFloat).transpose(1, 2)).contiguous());
  }
  return DISPATCH(q, "anchored_decode", [&] {
    using U = Factor<scalar_t>;
    for (Tensor& x : u) x = x.to(c10::CppTypeToScalarType<U>::value);
    auto scores = [&](const Task& task, int64_t t, int64_t n, float* out) {
      for (int64_t i = 0; i < latents; ++i) {
        const int64_t l = task.unit * latents + i;
        float* found = out + i * rows * TILE;
        auto blocks = [&](const auto& use) {  // use(block, its first slot here, and how many)
          for (int64_t from = t; from < t + n;) {
            const int64_t b = from / block, to = std::min(t + n, (b + 1) * block);
            use(b, from, to - from);
            from = to;
          }
        };
        with_rows<scalar_t>(keys, task.b, l, t, [&](const auto* latent) {
          using A = Factor<std::decay_t<decltype(*latent)>>;
          std::vector<A> near(rows * rank);  // a block's queries, where they must be converted
          blocks([&](int64_t b, int64_t from, int64_t count) {
            auto take = [&](const A* a, int64_t lda) {
              multiply(a, rows, lda, latent + (from - t) * z.stride(2), count, z.stride(2),
                       z.size(3), found + from - t, TILE);
            };
            const U* a = u[task.b].const_data_ptr<U>() + (l * rows * N + b) * rank;
            if constexpr (std::is_same_v<A, U>) return take(a, N * rank);
            for (int64_t r = 0; r < rows; ++r) at::vec::convert(a + r * N * rank, &near[r * rank], rank);
            take(near.data(), rank);
          });
        });
        keys.weigh(found, rows, TILE, task.b, l, t, n);
        blocks([&](int64_t b, int64_t from, int64_t count) {
          for (int64_t r = 0; mean && r < rows; ++r) {
            const float more = added[task.b].const_data_ptr<float>()[(l * rows + r) * N + b];
            for (int64_t j = 0; j < count; ++j) found[r * TILE + from - t + j] += more;
          }
        });
      }
    };
    return attend<scalar_t>(q, K, values, span, scale, bias, std::nullopt, [&] { return scores; });
  });
}

// use(L()) for the numbers in which a library multiplies matrices of T fastest on one core: bf16 where
// a processor has tiles of it (AMX). `size` is what is summed over.
template <class T, class Use>
Tensor with_lift(int64_t size, const Use& use) {
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (size % 2 == 0 && at::native::cpublas::could_pack(at::kBFloat16)) return use(at::BFloat16());
  return use(float());
}

// Matrices (n, size, width) for `lift`, which takes two rows of bf16 side by side
template <class L>
Tensor lifting(const Tensor& maps) {
  Tensor x = maps.to(c10::CppTypeToScalarType<L>::value);
  if (std::is_same_v<L, at::BFloat16>) x = x.unflatten(1, {-1, 2}).transpose(2, 3);
  return x.contiguous();
}

// out (rows, width) = a (rows, size) times one of those matrices
template <class L>
void lift(const L* a, int64_t rows, int64_t lda, const L* map, int64_t size, int64_t width, float* out,
          int64_t ldo) {
  at::native::cpublas::brgemm(rows, width, size, lda, width, ldo, false, a, map, out,
                              std::is_same_v<L, at::BFloat16>);
}

// out[r][j] = q[r] · what key j (n, D) becomes by mean, cosines and sines, for M rows of q
template <int M>
void compare_rows(const float* q, const float* keys, int64_t room, const float* mean, const float* c,
                  const float* s, int64_t half, int64_t n, float* out) {
  V sums[M * W];
  for (int64_t first = 0; first < n; first += W) {
    const int64_t some = std::min(W, n - first);
    for (int64_t j = 0; j < some; ++j) {
      const float *k = keys + (first + j) * room, *cj = c + (first + j) * half,
                  *sj = s + (first + j) * half;
      V sum[M];
      for (int r = 0; r < M; ++r) sum[r] = V(0.f);
      for (int64_t d = 0; d < half; d += W) {
        const int64_t count = std::min(W, half - d);
        V a = load(k + d, count), b = load(k + half + d, count);
        if (mean) a = a + load(mean + d, count), b = b + load(mean + half + d, count);
        const V x = load(cj + d, count), y = load(sj + d, count);
        const V turned = a * x - b * y, other = b * x + a * y;
        for (int r = 0; r < M; ++r) {
          const float* to = q + r * 2 * half + d;
          sum[r] = at::vec::fmadd(load(to, count), turned, sum[r]);
          sum[r] = at::vec::fmadd(load(to + half, count), other, sum[r]);
        }
      }
      for (int r = 0; r < M; ++r) sums[r * W + j] = sum[r];
    }
    for (int r = 0; r < M; ++r) totals(sums + r * W).store(out + r * TILE + first, some);
  }
}

void compare(const float* q, int64_t rows, const float* keys, int64_t room, const float* mean,
             const float* c, const float* s, int64_t half, int64_t n, float* out) {
  int64_t r = 0;
  auto next = [&](auto count) {
    constexpr int M = decltype(count)::value;
    for (; r + M <= rows; r += M)
      compare_rows<M>(q + r * 2 * half, keys, room, mean, c, s, half, n, out + r * TILE);
  };
  next(std::integral_constant<int, 4>());
  next(std::integral_constant<int, 1>());
}

Tensor rotary_decode(const Tensor& q, const Tensor& z, const Tensor& v, const Tensor& span,
                     double scale, const Tensor& cos, const Tensor& sin, const Tensor& up,
                     const Maybe& mean, const Maybe& bias, const Maybe& z_scale,
                     const Maybe& v_scale) {
  const Kept latent{z, z_scale}, values{v, v_scale};
  const int64_t H = q.size(1), D = q.size(3), K = z.size(1), rank = latent.width(), G = up.size(2) / D * K;
  const int64_t latents = K / std::gcd(K, v.size(1)), rows = H / G * q.size(2), half = D / 2;
  const int64_t room = whole(D);
  const Tensor x = q.to(at::kFloat).contiguous();
  const Tensor base = mean ? mean->to(at::kFloat).contiguous() : Tensor();
  const Tensor c = cos.contiguous(), s = sin.contiguous();
  return DISPATCH(q, "rotary_decode", [&] {
    return with_lift<scalar_t>(rank, [&](auto number) {
      using L = decltype(number);
      const Tensor maps = lifting<L>(up.unflatten(2, {G / K, D}).transpose(1, 2).flatten(0, 1));
      auto scorer = [&] {
        return [&, tile = std::vector<L>(), factor = std::vector<float>(),
                keys = std::vector<float>(LIFTED * room)](const Task& task, int64_t t, int64_t n,
                                                          float* out) mutable {
          const int64_t angles = ((cos.size(0) == 1 ? 0 : task.b) * cos.size(2) + t) * half;
          for (int64_t i = 0; i < latents; ++i) {
            const int64_t l = task.unit * latents + i;
            const L* rows_of = nullptr;  // LIFTED at a time: kernels are made for a shape
            int64_t step = z.stride(2);
            with_rows<scalar_t>(latent, task.b, l, t, [&](const auto* kept) {
              if constexpr (std::is_same_v<decltype(kept), const L*>) {
                if (n % LIFTED == 0) return void(rows_of = kept);
              }
              factor.assign(n, 1.f);  // scales, rounded in as the definition does
              latent.weigh(factor.data(), 1, n, task.b, l, t, n);
              tile.resize(TILE * rank);
              with_halves(kept, z.size(3), [&](const auto* numbers, int64_t first) {
                for (int64_t j = 0; j < n; ++j)
                  for (int64_t d = 0; d < z.size(3); d += W) {
                    const int64_t count = std::min(W, z.size(3) - d);
                    const V number = load(numbers + j * z.stride(2) + d, count);
                    store(number * V(factor[j]), &tile[j * rank + first + d], count);
                  }
              });
              rows_of = tile.data(), step = rank;
            });
            for (int64_t g = 0; g < G / K; ++g) {  // lifted, rotated and compared, never written back
              const int64_t kv = l * (G / K) + g;
              for (int64_t j = 0; j < n; j += LIFTED) {
                lift(rows_of + j * step, LIFTED, step, maps.const_data_ptr<L>() + kv * rank * D, rank,
                     D, keys.data(), room);
                compare(x.const_data_ptr<float>() + (task.b * G + kv) * rows * D, rows, keys.data(),
                        room, mean ? base.const_data_ptr<float>() + kv * D : nullptr,
                        c.const_data_ptr<float>() + angles + j * half,
                        s.const_data_ptr<float>() + angles + j * half, half,
                        std::min(LIFTED, n - j), out + (i * (G / K) + g) * rows * TILE + j);
              }
            }
          }
          at::native::cpublas::brgemm_release();
        };
      };
      return attend<scalar_t>(q, K, values, span, scale, bias, std::nullopt, scorer);
    });
  });
}

// out = scale * (x weightᵀ) + bias for the few rows of x (..., in), weight (out, in) of T
template <class T, class X>
void product(const Tensor& x, const Tensor& weight, const Maybe& scale, const Maybe& bias, Tensor& out) {
  using A = Factor<T>;
  const int64_t size = weight.size(1), outputs = weight.size(0), rows = x.numel() / size;
  const Tensor given = x.to(c10::CppTypeToScalarType<A>::value).contiguous();
  const A* a = given.const_data_ptr<A>();
  const T* w = weight.const_data_ptr<T>();
  const float* scales = scale ? scale->const_data_ptr<float>() : nullptr;
  const X* more = bias ? bias->const_data_ptr<X>() : nullptr;
  X* y = out.data_ptr<X>();
  // a part of x that stays next to the processor, and so many weights that stay near for all rows
  const int64_t part = rows > 2 ? 4096 / int64_t(sizeof(A)) : size;
  const int64_t near = std::max<int64_t>(W, (1 << 18) / int64_t(part * sizeof(T)) / W * W);
  at::parallel_for(0, (outputs + W - 1) / W, near / W, [&](int64_t begin, int64_t end) {
    std::vector<float> found(rows * near), sums(rows * near);
    for (int64_t j = begin * W; j < std::min(end * W, outputs); j += near) {
      const int64_t n = std::min({near, end * W - j, outputs - j}), ld = weight.stride(0);
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t i = 0; i < size; i += part) {
        multiply(a + i, rows, size, w + j * ld + i, n, ld, std::min(part, size - i), found.data(), near);
        for (int64_t k = 0; k < rows * near; ++k) sums[k] += found[k];
      }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < n; ++i)
          y[r * outputs + j + i] = X(sums[r * near + i] * (scales ? scales[j + i] : 1.f) +
                                     (more ? float(more[j + i]) : 0.f));
    }
  });
}

Tensor linear_decode(const Tensor& x, const Tensor& weight, const Maybe& scale, const Maybe& bias) {
  TORCH_CHECK(weight.stride(1) == 1, "linear_decode: expected rows of weights that lie in one piece");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor out = at::empty(shape, x.options());
  DISPATCH(x, "linear_decode", [&] {
    if (weight.scalar_type() == at::kChar)
      product<int8_t, scalar_t>(x, weight, scale, bias, out);
    else
      product<scalar_t, scalar_t>(x, weight, scale, bias, out);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(eigenzoo, CPU, m) {
  m.impl("latent_decode", latent_decode);
  m.impl("anchored_decode", anchored_decode);
  m.impl("rotary_decode", rotary_decode);
  m.impl("linear_decode", linear_decode);
}

TORCH_LIBRARY_IMPL(eigenzoo, Autograd, m) {  // backward is an error, not a gradient that is missing
  for (const char* op : {"latent_decode", "anchored_decode", "rotary_decode", "linear_decode"})
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
}

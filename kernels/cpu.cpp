// Decoding attention on a CPU, for the definitions in zoo/attention.py. Everything is made of two
// products that stay in cache: `multiply` (rows by rows) and `mix` (weights by rows), on ATen's
// portable vectors. Memory is read once, in the dtype it is kept in; sums are fp32.
//
// B sequences, T new tokens, H query heads, K latents of keys, L of values, S slots. A unit is the
// least set of heads that shares its latents with no other: gcd(K, L) of them.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
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
constexpr int64_t AHEAD = 2048;  // bytes
constexpr float NEVER = -std::numeric_limits<float>::infinity();

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
template <class T>
V load(const T* p, int64_t count) {  // the first numbers, zeros behind them
  T all[W] = {};
  std::copy_n(p, count, all);
  return load(all);
}

// asks memory for what is read soon; past the end it does nothing
inline void ahead(const void* p, int64_t bytes = 0) {
  __builtin_prefetch(static_cast<const char*>(p) + bytes);
}

// out[m][n] = a[m] · b[n] for M rows of a and N of b, `size` numbers long
template <int M, int N, class T>
inline void dots(const float* a, int64_t lda, const T* b, int64_t ldb, int64_t size, float* out,
                 int64_t ldo) {
  V sum[M][N];
  for (auto& row : sum)
    for (auto& x : row) x = V(0.f);
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    V x[M];
    for (int m = 0; m < M; ++m) x[m] = V::loadu(a + m * lda + i);
    for (int n = 0; n < N; ++n) {
      ahead(b + n * ldb + i, AHEAD);
      V y = load(b + n * ldb + i);
      for (int m = 0; m < M; ++m) sum[m][n] = at::vec::fmadd(x[m], y, sum[m][n]);
    }
  }
  if (i < size)
    for (int n = 0; n < N; ++n) {
      V y = load(b + n * ldb + i, size - i);
      for (int m = 0; m < M; ++m)
        sum[m][n] = at::vec::fmadd(load(a + m * lda + i, size - i), y, sum[m][n]);
    }
  if constexpr (M * N == W) {  // W sums at once: turn the square, add its rows
    float square[W * W], turned[W * W], sums[W];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sum[m][n].store(square + (m * N + n) * W);
    at::vec::transpose_mxn<float, W, W>(square, W, turned, W);
    V total = V::loadu(turned);
    for (int j = 1; j < W; ++j) total = total + V::loadu(turned + j * W);
    total.store(sums);
    for (int m = 0; m < M; ++m) std::copy_n(sums + m * N, N, out + m * ldo);
  } else {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        float parts[W];
        sum[m][n].store(parts);
        out[m * ldo + n] = std::accumulate(parts, parts + W, 0.f);
      }
  }
}

template <int M, class T>
void multiply_rows(const float* a, int64_t lda, const T* b, int64_t cols, int64_t ldb, int64_t size,
                   float* out, int64_t ldo) {
  constexpr int N = W / M;
  int64_t n = 0;
  for (; n + N <= cols; n += N) dots<M, N>(a, lda, b + n * ldb, ldb, size, out + n, ldo);
  for (; n < cols; ++n) dots<M, 1>(a, lda, b + n * ldb, ldb, size, out + n, ldo);
}

// out (rows, cols) = a (rows, size) bᵀ, b (cols, size)
template <class T>
void multiply(const float* a, int64_t rows, int64_t lda, const T* b, int64_t cols, int64_t ldb,
              int64_t size, float* out, int64_t ldo) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) multiply_rows<4>(a + m * lda, lda, b, cols, ldb, size, out + m * ldo, ldo);
  if (m + 2 <= rows) multiply_rows<2>(a + m * lda, lda, b, cols, ldb, size, out + m * ldo, ldo), m += 2;
  if (m < rows) multiply_rows<1>(a + m * lda, lda, b, cols, ldb, size, out + m * ldo, ldo);
}

// out[m] = keep[m] out[m] + Σ_t p[m][t] v[t], for M rows and N vectors of their width
template <int M, int N, class T>
inline void blend(const float* p, int64_t ldp, const T* v, int64_t slots, int64_t ldv,
                  const float* keep, float* out, int64_t ldo) {
  V sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = V::loadu(out + m * ldo + n * W) * V(keep[m]);
  for (int64_t t = 0; t < slots; ++t) {
    V y[N];
    for (int n = 0; n < N; ++n) {
      ahead(v + (t + slots) * ldv + n * W);
      y[n] = load(v + t * ldv + n * W);
    }
    for (int m = 0; m < M; ++m) {
      V x(p[m * ldp + t]);
      for (int n = 0; n < N; ++n) sum[m][n] = at::vec::fmadd(x, y[n], sum[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n].store(out + m * ldo + n * W);
}

template <int M, int N, class T>
void mix_rows(const float* p, int64_t ldp, const T* v, int64_t slots, int64_t ldv, int64_t width,
              const float* keep, float* out, int64_t ldo) {
  int64_t i = 0;
  for (; i + N * W <= width; i += N * W)
    blend<M, N>(p, ldp, v + i, slots, ldv, keep, out + i, ldo);
  if constexpr (N > 1) {
    if (i < width) mix_rows<M, N / 2>(p, ldp, v + i, slots, ldv, width - i, keep, out + i, ldo);
  } else {
    for (; i < width; ++i)
      for (int m = 0; m < M; ++m) {
        float x = out[m * ldo + i] * keep[m];
        for (int64_t t = 0; t < slots; ++t) x += p[m * ldp + t] * float(v[t * ldv + i]);
        out[m * ldo + i] = x;
      }
  }
}

// out (rows, width) = keep (rows) * out + p (rows, slots) v, v (slots, width)
template <class T>
void mix(const float* p, int64_t rows, int64_t ldp, const T* v, int64_t slots, int64_t ldv,
         int64_t width, const float* keep, float* out, int64_t ldo) {
  constexpr int N = W == 16 ? 4 : 2;  // 16 or 8 sums in registers
  // a strip of slots at a time: memory is read row after row, and what is read again is near
  const int64_t strip = std::max<int64_t>(8, 16384 / (width * sizeof(T)));
  const float ones[4] = {1.f, 1.f, 1.f, 1.f};
  for (int64_t t = 0; t < slots; t += strip) {
    const int64_t n = std::min(strip, slots - t);
    const T* x = v + t * ldv;
    auto kept = [&](int64_t m) { return t ? ones : keep + m; };
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4)
      mix_rows<4, N>(p + m * ldp + t, ldp, x, n, ldv, width, kept(m), out + m * ldo, ldo);
    if (m + 2 <= rows) {
      mix_rows<2, 2 * N>(p + m * ldp + t, ldp, x, n, ldv, width, kept(m), out + m * ldo, ldo);
      m += 2;
    }
    if (m < rows)
      mix_rows<1, 4 * N>(p + m * ldp + t, ldp, x, n, ldv, width, kept(m), out + m * ldo, ldo);
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

// p = exp(scores - peak) in place, a row of n; returns their sum
inline float soften(float* s, int64_t n, float peak) {
  V total(0.f);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    V p = (V::loadu(s + i) - V(peak)).exp();
    p.store(s + i);
    total = total + p;
  }
  float parts[W];
  total.store(parts);
  float sum = std::accumulate(parts, parts + W, 0.f);
  for (; i < n; ++i) sum += s[i] = std::exp(s[i] - peak);
  return sum;
}

struct Task {  // what a thread is at: a sequence, and a unit of its heads
  int64_t b, unit;
};

// Everything but the scores. `scores(task, first, n, out)` fills out (rows, TILE) for n slots.
template <class T, class Scores>
Tensor attend(const Tensor& q, int64_t keys, const Tensor& v, const Tensor& span, const Maybe& bias,
              const Maybe& slopes, const Scores& scores) {
  const int64_t B = q.size(0), H = q.size(1), news = q.size(2), L = v.size(1), width = v.size(3);
  const int64_t units = std::gcd(keys, L), rows = H / units * news, latents = L / units;
  Tensor out = at::empty({B, H, news, width}, q.options());
  const int64_t* ends = span.const_data_ptr<int64_t>();
  auto bounds = [&](int64_t b) { return ends + (span.size(0) == 1 ? 0 : 2 * b); };
  int64_t longest = 1;
  for (int64_t b = 0; b < B; ++b) longest = std::max(longest, bounds(b)[1] - bounds(b)[0]);
  const int64_t wanted = (4 * at::get_num_threads() + B * units - 1) / (B * units);
  const int64_t splits = std::max<int64_t>(1, std::min(wanted, longest / 512));
  const int64_t part = rows * (width + 2);  // sums, then peaks, then totals
  std::vector<float> parts(B * units * splits * part);

  at::parallel_for(0, B * units * splits, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> s(rows * TILE), keep(rows);
    for (int64_t item = begin; item < end; ++item) {
      const Task task{item / splits / units, item / splits % units};
      const int64_t split = item % splits, *bound = bounds(task.b);
      const int64_t each = ((bound[1] - bound[0] + splits - 1) / splits + TILE - 1) / TILE * TILE;
      const int64_t from = bound[0] + split * each, to = std::min(bound[1], from + each);
      float *sums = &parts[item * part], *peaks = sums + rows * width, *totals = peaks + rows;
      std::fill_n(peaks, rows, NEVER);
      for (int64_t t = from; t < to; t += TILE) {
        const int64_t n = std::min(TILE, to - t);
        scores(task, t, n, s.data());
        for (int64_t r = 0; r < rows; ++r) {
          float* row = &s[r * TILE];
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
        for (int64_t l = 0; l < latents; ++l) {
          const int64_t first = l * (rows / latents);
          const T* values = v.const_data_ptr<T>() + task.b * v.stride(0) +
                            (task.unit * latents + l) * v.stride(1) + t * v.stride(2);
          mix(&s[first * TILE], rows / latents, TILE, values, n, v.stride(2), width, &keep[first],
              sums + first * width, width);
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
        for (int64_t i = 0; i < splits; ++i) peak = std::max(peak, at(i)[rows * width + r]);
        std::vector<float> sum(width);
        for (int64_t i = 0; i < splits; ++i) {
          const float* p = at(i);
          const float weight = std::exp(p[rows * width + r] - peak);
          total += weight * p[rows * (width + 1) + r];
          for (int64_t j = 0; j < width; ++j) sum[j] += weight * p[r * width + j];
        }
        for (int64_t j = 0; j < width; ++j) y[(item * rows + r) * width + j] = T(sum[j] / total);
      }
  });
  return out;
}

// Queries (B, H, T, D) in fp32, one after the other
Tensor queries(const Tensor& q, double scale) {
  return q.to(at::kFloat).mul(scale).contiguous();
}

// The rows of latent l of sequence b, from slot t on: x (B, L, S, R) as the cache keeps it
template <class T>
const T* slots(const Tensor& x, int64_t b, int64_t l, int64_t t) {
  return x.const_data_ptr<T>() + b * x.stride(0) + l * x.stride(1) + t * x.stride(2);
}

Tensor latent_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& span,
                     double scale, const Maybe& bias, const Maybe& slopes) {
  const Tensor x = queries(q, scale);
  const int64_t K = k.size(1), rank = q.size(3), rows = q.size(1) / K * q.size(2);
  const int64_t latents = K / std::gcd(K, v.size(1));
  return DISPATCH(k, "latent_decode", [&] {
    auto scores = [&](const Task& task, int64_t t, int64_t n, float* out) {
      for (int64_t i = 0; i < latents; ++i) {
        const int64_t l = task.unit * latents + i;
        const float* a = x.const_data_ptr<float>() + (task.b * K + l) * rows * rank;
        multiply(a, rows, rank, slots<scalar_t>(k, task.b, l, t), n, k.stride(2), rank,
                 out + i * rows * TILE, TILE);
      }
    };
    return attend<scalar_t>(q, K, v, span, bias, slopes, scores);
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
                       const Maybe& mean, int64_t block, const Maybe& bias) {
  const Tensor x = queries(q, scale);
  const int64_t B = q.size(0), H = q.size(1), D = q.size(3), K = z.size(1), rank = z.size(3);
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
    u.push_back(at::bmm(turned.to(exact), maps).to(at::kFloat));  // (G, H / G N, R)
    if (mean) added.push_back(at::bmm(turned, mean->to(at::kFloat).transpose(1, 2)).contiguous());
  }
  return DISPATCH(z, "anchored_decode", [&] {
    auto scores = [&](const Task& task, int64_t t, int64_t n, float* out) {
      for (int64_t i = 0; i < latents; ++i) {
        const int64_t l = task.unit * latents + i;
        const float* a = u[task.b].const_data_ptr<float>() + l * rows * N * rank;
        float* found = out + i * rows * TILE;
        for (int64_t from = t; from < t + n;) {
          const int64_t b = from / block, to = std::min(t + n, (b + 1) * block);
          multiply(a + b * rank, rows, N * rank, slots<scalar_t>(z, task.b, l, from), to - from,
                   z.stride(2), rank, found + from - t, TILE);
          for (int64_t r = 0; mean && r < rows; ++r) {
            const float more = added[task.b].const_data_ptr<float>()[(l * rows + r) * N + b];
            for (int64_t j = from - t; j < to - t; ++j) found[r * TILE + j] += more;
          }
          from = to;
        }
      }
    };
    return attend<scalar_t>(q, K, v, span, bias, std::nullopt, scores);
  });
}

Tensor rotary_decode(const Tensor& q, const Tensor& z, const Tensor& v, const Tensor& span,
                     double scale, const Tensor& cos, const Tensor& sin, const Tensor& up,
                     const Maybe& mean, const Maybe& bias) {
  const Tensor x = queries(q, scale);
  const int64_t H = q.size(1), D = q.size(3), K = z.size(1), rank = z.size(3), G = up.size(2) / D * K;
  const int64_t latents = K / std::gcd(K, v.size(1)), rows = H / G * q.size(2), half = D / 2;
  const Tensor base = (mean ? mean->to(at::kFloat) : at::zeros({G, D}, x.options())).contiguous();
  return DISPATCH(z, "rotary_decode", [&] {
    auto scores = [&](const Task& task, int64_t t, int64_t n, float* out) {
      std::vector<float> tile(n * rank), keys(n * D), ones(n, 1.f);
      const int64_t angles = ((cos.size(0) == 1 ? 0 : task.b) * cos.size(2) + t) * half;
      const float *c = cos.const_data_ptr<float>() + angles, *s = sin.const_data_ptr<float>() + angles;
      for (int64_t i = 0; i < latents; ++i) {
        const int64_t l = task.unit * latents + i;
        const scalar_t* latent = slots<scalar_t>(z, task.b, l, t);
        for (int64_t j = 0; j < n; ++j)
          std::copy_n(latent + j * z.stride(2), rank, &tile[j * rank]);  // to fp32
        for (int64_t g = 0; g < G / K; ++g) {  // lifted, rotated and compared, never written back
          const int64_t kv = l * (G / K) + g;
          for (int64_t j = 0; j < n; ++j)
            std::copy_n(base.const_data_ptr<float>() + kv * D, D, &keys[j * D]);
          mix(tile.data(), n, rank, up.const_data_ptr<scalar_t>() + l * up.stride(0) + g * D, rank,
              up.stride(1), D, ones.data(), keys.data(), D);
          for (int64_t j = 0; j < n; ++j)
            for (int64_t d = 0; d < half; ++d) {
              const float cj = c[j * half + d], sj = s[j * half + d];
              float &a = keys[j * D + d], &b = keys[j * D + half + d];
              const float turned = a * cj - b * sj;
              b = b * cj + a * sj;
              a = turned;
            }
          multiply(x.const_data_ptr<float>() + (task.b * G + kv) * rows * D, rows, D, keys.data(), n,
                   D, D, out + (i * (G / K) + g) * rows * TILE, TILE);
        }
      }
    };
    return attend<scalar_t>(q, K, v, span, bias, std::nullopt, scores);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(eigenzoo, CPU, m) {
  m.impl("latent_decode", latent_decode);
  m.impl("anchored_decode", anchored_decode);
  m.impl("rotary_decode", rotary_decode);
}

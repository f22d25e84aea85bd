// Queries as rows of codes are multiplied with them in rounded.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bytes.h"
#include "packing.h"

#ifdef MULTIPLIES_BYTES
namespace {

// Bytes of a segment that hold equal parts of its numbers, one after another, each in `bits` bits
// of all bytes. With 3 bits there are two planes: of the low two bits, and of the third.
struct Plane {
  int64_t bits, offset, bytes;  // `offset` from the first byte of the latent
  int64_t word;                 // where its words begin: those of part 0, those of part 1...

  int64_t words() const { return (bytes + 3) / 4; }  // of a part
  int64_t parts() const { return bits == 16 ? 2 : 8 / bits; }
};

// How a query is kept: as words of 32 bits that are multiplied with the lanes of slots. With 16
// bits, a part is every second number, in fp32, otherwise words hold four high bytes. Behind them
// are as many words of low bytes, then four numbers per segment with a scale, see `Factors`.
struct Words {
  struct Range {  // of a segment
    int64_t bits, first, width;  // its numbers
    int64_t begin, end;          // its words
    int64_t plane, planes;
  };
  std::vector<Plane> planes;
  std::vector<Range> ranges;
  int64_t count = 0, size = 0;  // words of high bytes, and all

  explicit Words(const Packing& packing) {
    int64_t first = 0;
    for (const Segment& s : packing.segments) {
      Range range{s.bits, first, s.width, count, 0, int64_t(planes.size()), 0};
      auto add = [&](int64_t bits, int64_t offset) {
        const Plane x{bits, offset, s.width * bits / 8, count};
        planes.push_back(x);
        count += x.parts() * x.words();
      };
      add(s.bits == 3 ? 2 : s.bits, s.offset);
      if (s.bits == 3) add(1, s.offset + s.width / 4);
      range.end = count;
      range.planes = planes.size() - range.plane;
      ranges.push_back(range);
      first += s.width;
    }
    size = 2 * count + 4 * packing.scales;
  }
};

constexpr float LOW = 1 / 254.f;  // a low byte stands for so much of a high one: at most a half

struct Factors {  // of the bytes of a query's segment
  // What sums of products of high and of low bytes begin with: minus the part of what code 0 stands
  // for. They stand for scale * (high + LOW * low) + add.
  int high, low;
  float scale, add;
};

// Writes the bytes of a query's segment to the words of plane number `first` and of those after it
inline void lay_out(const int8_t* high, const int8_t* low, const Words& words,
                    const Words::Range& s, int64_t first, int* y) {
  for (int64_t i = first; i < s.plane + s.planes; ++i) {
    const Plane& plane = words.planes[i];
    for (int64_t j = 0; j < plane.parts(); ++j) {
      int* to = y + plane.word + j * plane.words();
      for (const int8_t* from : {high, low}) {
        to[plane.words() - 1] = 0;  // which numbers may not fill
        std::memcpy(to, from + j * plane.bytes, plane.bytes);
        to += words.count;
      }
    }
  }
}

// A query x, (width,) in the order of the model, as words y
inline void round_query(const float* x, const Words& words, int* y) {
  thread_local std::vector<int8_t> bytes;
  int* factors = y + 2 * words.count;
  for (const Words::Range& s : words.ranges) {
    const float* a = x + s.first;
    if (s.bits == 16) {
      const int64_t part = (s.end - s.begin) / 2;
      y[s.end - 1] = 0;  // where numbers are odd
      for (int64_t i = 0; i < s.width; ++i)
        std::memcpy(y + s.begin + i % 2 * part + i / 2, a + i, sizeof *a);
      continue;
    }
    Bytes most = repeat(0);  // of the bits without sign, which order numbers as they are, NaN last
    for (int64_t i = 0; i < s.width; i += W)
      most = larger(most, as_bytes(load(a + i, std::min(W, s.width - i))) & repeat(0x7fffffff));
    const int bits = largest_lane(most);
    float peak;
    std::memcpy(&peak, &bits, sizeof peak);
    const V inverse(peak > 0.f ? 127.f / peak : 0.f);
    // Parts that fill whole words follow one another as the numbers do
    const bool whole = words.planes[s.plane + s.planes - 1].bytes % 4 == 0;
    bytes.resize(whole ? 0 : 2 * s.width);
    int8_t* high = whole ? reinterpret_cast<int8_t*>(y + s.begin) : bytes.data();
    int8_t* low = whole ? reinterpret_cast<int8_t*>(y + words.count + s.begin) : high + s.width;
    Bytes high_sums = repeat(0), low_sums = repeat(0);
    for (int64_t i = 0; i < s.width; i += W) {
      const int64_t n = std::min(W, s.width - i);
      const V number = load(a + i, n) * inverse;
      const Bytes nearest = to_integers(number);
      const Bytes rest = to_integers((number - to_floats(nearest)) * V(1 / LOW));
      high_sums = plus(high_sums, nearest);
      low_sums = plus(low_sums, rest);
      store_bytes(nearest, high + i, n);
      store_bytes(rest, low + i, n);
    }
    lay_out(high, low, words, s, s.plane + whole, y);
    const float zero = s.bits == 8 ? UNSIGNED_ZERO : ((1 << s.bits) - 1) / 2.f;
    const float of_high = zero * lanes_sum(high_sums), of_low = zero * lanes_sum(low_sums);
    const float start = std::floor(of_high), start_low = std::floor(of_low), scale = peak / 127.f;
    const Factors f{-int(start), -int(start_low), scale,
                    scale * (start - of_high + LOW * (start_low - of_low))};
    std::memcpy(factors, &f, sizeof f);
    factors += 4;
  }
}

}  // namespace
#endif

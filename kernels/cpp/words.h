// Queries as rows of codes are multiplied with them in rounded.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bytes.h"
#include "codes.h"
#include "packing.h"

#ifdef MULTIPLIES_BYTES
namespace {

// How a query is kept: as words of 32 bits that are multiplied with the lanes of slots. Words hold
// four high bytes; with 16 bits, they hold a number in fp32, first every even number, then every
// odd one. Behind them are as many words of low bytes, then what its numbers were divided by.
struct Words {
  struct Range {  // of a segment
    int64_t bits, first, width;  // its numbers
    int64_t begin, end;          // its words
    int64_t offset;              // of its bytes in the latent
    int64_t parts, bytes;        // of a part; with 3 bits, of the lowest two

    int64_t words() const { return (end - begin) / parts; }  // of a part
  };
  std::vector<Range> ranges;
  std::vector<int64_t> places;  // of the byte of each number
  bool in_order = true;         // each is behind the one before
  int64_t count = 0, size = 0;  // words of high bytes, and all

  explicit Words(const Packing& packing) {
    for (const Segment& s : packing.segments) {
      const int64_t parts = s.bits == 16 ? 2 : s.bits == 3 ? 4 : 8 / s.bits;
      const int64_t bytes = s.bits == 16 ? 2 * s.width : s.width / parts;
      const int64_t words = (bytes + 3) / 4, first = places.size();
      for (int64_t i = 0; s.bits == 16 && i < s.width; ++i)
        places.push_back(4 * (count + i % 2 * words + i / 2));
      for (int64_t part = 0; s.bits < 16 && part < parts; ++part)
        for (int64_t i = 0; i < bytes; ++i) places.push_back(4 * (count + part * words) + i);
      const int64_t begin = count;
      count += parts * words;
      ranges.push_back({s.bits, first, s.width, begin, count, s.offset, parts, bytes});
    }
    for (size_t i = 0; i < places.size(); ++i) in_order &= places[i] == int64_t(i);
    size = 2 * count + 1;
  }
};

// A number of a query without a sign: zero is half of the numbers there are
constexpr int QUERY_ZERO = 1 << (2 * DIGITS - 1);
constexpr int LARGEST = 127 << (2 * DIGITS - 8);  // whole numbers up to 127 stay exact

// A query x, (width,) in the order of the model, as words y
inline void round_query(const float* x, const Words& words, int* y) {
  const int64_t width = words.places.size();
  auto *high = reinterpret_cast<uint8_t*>(y), *low = reinterpret_cast<uint8_t*>(y + words.count);
  Bytes most = repeat(0);  // of the bits without sign, which order numbers as they are, NaN last
  for (int64_t i = 0; i < width; i += W)
    most = larger(most, as_bytes(load(x + i, std::min(W, width - i))) & repeat(0x7fffffff));
  const int bits = largest_lane(most);
  float peak;
  std::memcpy(&peak, &bits, sizeof peak);
  const float divisor = peak / LARGEST, inverse = peak > 0.f ? 1 / divisor : 0.f;
  y[2 * words.count] = 0;
  std::memcpy(y + 2 * words.count, &divisor, sizeof divisor);
  auto round = [&](int64_t i) {
    return to_integers(at::vec::fmadd(load(x + i, std::min(W, width - i)), V(inverse),
                                      V(float(QUERY_ZERO))));
  };
  if (words.in_order && width % W == 0) {
    for (int64_t i = 0; i < width; i += W) {
      const Bytes number = round(i);
      store_bytes(down(number, DIGITS), high + i);
      store_bytes(number & repeat((1 << DIGITS) - 1), low + i);
    }
    return;
  }
  std::memset(high, QUERY_ZERO >> DIGITS, 4 * words.count);  // where there is no number
  std::memset(low, 0, 4 * words.count);
  for (int64_t i = 0; i < width; i += W) {
    alignas(64) int numbers[W];
    std::memcpy(numbers, &(const Bytes&)round(i), sizeof numbers);
    for (int64_t j = i; j < std::min(width, i + W); ++j) {
      high[words.places[j]] = numbers[j - i] >> DIGITS;
      low[words.places[j]] = numbers[j - i] & ((1 << DIGITS) - 1);
    }
  }
  for (const Words::Range& s : words.ranges)
    if (s.bits == 16) {
      y[s.end - 1] = 0;  // where numbers are odd
      for (int64_t i = s.first; i < s.first + s.width; ++i) {
        const float number = x[i] * inverse;
        std::memcpy(high + words.places[i], &number, sizeof number);
      }
    }
}

}  // namespace
#endif

// Scores of single elements and exact order statistics of them: the parts of row selection that need no
// vectors by hand. Part of rows_impl.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "convert.h"

namespace wanda::cpu {
namespace {

template <Dtype D>
inline float magnitude(typename Element<D>::Bits bits) {
  return to_float<D>(
      static_cast<typename Element<D>::Bits>(bits & (D == Dtype::kFloat32 ? 0x7fffffffu : 0x7fffu)));
}

// Ascending uint32 order of torch.sort: -0.0 equals +0.0, all NaNs are equal and the largest.
inline uint32_t order_of(float score) {
  const uint32_t bits = bits_of_float(score + 0.0f);
  const uint32_t order = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return score != score ? 0xffffffffu : order;
}

inline float absolute(float value) { return float_of_bits(bits_of_float(value) & 0x7fffffffu); }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }

inline int64_t count_below(const uint32_t* values, int64_t size, uint32_t limit) {
  int64_t total = 0;
  for (int64_t start = 0; start < size; start += 1 << 20) {
    const int64_t stop = min_of(size, start + (1 << 20));
    uint32_t part = 0;
    for (int64_t i = start; i < stop; ++i) part += values[i] < limit;
    total += part;
  }
  return total;
}

// The value v in [low, high] with count(< v) <= rank < count(<= v). Only such values may have that rank.
// Bisection on counts: at most 32 vectorised passes, whatever the values are.
inline uint32_t value_of_rank(const uint32_t* values, int64_t size, int64_t rank, uint32_t low,
                              uint32_t high) {
  uint32_t least = high, largest = low;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t up = values[i] < low ? high : values[i];
    const uint32_t down = values[i] > high ? low : values[i];
    least = up < least ? up : least;
    largest = down > largest ? down : largest;
  }
  while (least < largest) {
    const uint32_t middle = least + (largest - least) / 2 + 1;
    if (count_below(values, size, middle) > rank) {
      largest = middle - 1;
    } else {
      least = middle;
    }
  }
  return least;
}

}  // namespace
}  // namespace wanda::cpu

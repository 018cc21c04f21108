// Scores of single elements and exact order statistics of them: the parts of row selection that need no
// vectors by hand. Part of rows_impl.h, which says how to include it.
#pragma once

#include <cstdint>
#include <cstring>

#include "rows.h"

namespace wanda::cpu {
namespace {

template <Dtype D>
struct Element {
  using Raw = uint16_t;
};
template <>
struct Element<Dtype::kFloat32> {
  using Raw = uint32_t;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// |w| of a raw element. The half-precision path has no denormal float in it.
template <Dtype D>
inline float magnitude(typename Element<D>::Raw raw) {
  if constexpr (D == Dtype::kFloat32) {
    return float_of(raw & 0x7fffffffu);
  } else if constexpr (D == Dtype::kBFloat16) {
    return float_of(static_cast<uint32_t>(raw & 0x7fffu) << 16);
  } else {
    // Masks instead of branches, or else GCC does not vectorise the scalar path (8.7 ns an element).
    const int32_t half = raw & 0x7fff;
    const uint32_t is_small = 0u - (half < 0x400), is_special = 0u - (half >= 0x7c00);
    const uint32_t small = bits_of(static_cast<float>(half) * 0x1p-24f);
    const uint32_t normal = (static_cast<uint32_t>(half) << 13) + (112u << 23) + (is_special & 112u << 23);
    return float_of((small & is_small) | (normal & ~is_small));
  }
}

// Ascending uint32 order of torch.sort: -0.0 equals +0.0, all NaNs are equal and the largest.
inline uint32_t order_of(float score) {
  const uint32_t bits = bits_of(score + 0.0f);
  const uint32_t order = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return score != score ? 0xffffffffu : order;
}

inline float absolute(float value) { return float_of(bits_of(value) & 0x7fffffffu); }
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

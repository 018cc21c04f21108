// Row selection's steps in portable C++: plain loops that compilers vectorise for whatever the build's flags
// allow.
#pragma once

#include "rows_impl.h"

namespace wanda::cpu {
namespace {

template <>
struct RowsSteps<Scalar> {
  typedef int32_t Lanes __attribute__((vector_size(16)));

  // Eight keys. The vector extension of GCC and Clang gives SSE2, NEON or plain code; from loops over 16-bit
  // comparisons GCC makes code that is three times slower.
  typedef int16_t Keys __attribute__((vector_size(16)));

  static Keys load(const void* from) {
    Keys x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }

  static Keys all_of(int value) { return Keys{} + static_cast<int16_t>(value); }

  template <Dtype D>
  WANDA_PASS static int64_t make_keys(const typename Element<D>::Bits* w, const float* norm, uint16_t* keys,
                                      int64_t blocks, int base, int span) {
    int64_t sum = 0;
    for (int64_t start = 0; start < blocks * kBlock; start += kBlock) {
      int32_t part = 0;
      for (int64_t i = start; i < start + kBlock; ++i) {
        const int32_t key = (bits_of_float(magnitude<D>(w[i]) * norm[i]) & 0x7fffffffu) >> 16;
        const int32_t over = key < base ? 0 : key - base;
        part += over < span ? over : span;
        keys[i] = static_cast<uint16_t>(key);
      }
      sum += part;
    }
    return sum;
  }

  template <Dtype D>
  WANDA_PASS static void count(const uint16_t* keys, int64_t blocks, const int32_t* limits, int64_t* counts,
                               const char*) {
    constexpr int64_t kBlocks = 4000;  // no 16-bit lane overflows
    for (int t = 0; t < kLimits; ++t) counts[t] = 0;
    for (int64_t first = 0; first < blocks; first += kBlocks) {
      const int64_t stop = min_of(blocks, first + kBlocks) * kBlock;
      Keys part[kLimits] = {};
      for (int64_t start = first * kBlock; start < stop; start += kBlock) {
        for (int t = 0; t < kLimits; ++t) {
          const Keys limit = all_of(limits[t]);
          Keys below = {};
          for (int64_t i = start; i < start + kBlock; i += 8) below -= load(keys + i) < limit;
          part[t] += below;
        }
      }
      for (int t = 0; t < kLimits; ++t) {
        for (int i = 0; i < 8; ++i) counts[t] += part[t][i];
      }
    }
  }

  template <Dtype D, bool kMask, bool kSums>
  WANDA_PASS static int64_t write(typename Element<D>::Bits* w, bool* mask, const uint16_t* keys,
                                  const float* norm, int64_t blocks, int below, int last, int32_t* columns,
                                  int32_t first_column, Sums& sums, const char*) {
    const Keys below8 = all_of(below), last8 = all_of(last);
    int64_t listed = 0;
    for (int64_t start = 0; start < blocks * kBlock; start += kBlock) {
      if constexpr (kSums) {
        for (int64_t i = start; i < start + kBlock; ++i) {
          const float score = magnitude<D>(w[i]) * norm[i];
          sums.all += score * score;
          sums.pruned += keys[i] <= below ? score * score : 0.0f;
        }
      }
      if constexpr (kMask || sizeof(*w) != sizeof(int16_t)) {
        for (int64_t i = start; i < start + kBlock; ++i) {
          if constexpr (kMask) {
            mask[i] = keys[i] <= below;
          } else {
            w[i] = keys[i] <= below ? 0 : w[i];
          }
        }
      }
      for (int64_t i = start; i < start + kBlock; i += 8) {
        const Keys key = load(keys + i);
        const Keys above = key > below8;
        const Keys inside = above & (key <= last8);
        if constexpr (!kMask && sizeof(*w) == sizeof(int16_t)) {
          const Keys kept = load(w + i) & above;
          std::memcpy(w + i, &kept, sizeof kept);
        }
        uint64_t bits[2];
        std::memcpy(bits, &inside, sizeof bits);
        if ((bits[0] | bits[1]) == 0) continue;
        for (int64_t j = 0; j < 8; ++j) {
          if (inside[j] != 0) columns[listed++] = first_column + static_cast<int32_t>(i + j);
        }
      }
    }
    return listed;
  }
};

}  // namespace
}  // namespace wanda::cpu

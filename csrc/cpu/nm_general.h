// N:M selection for any M and any norm. M <= 32 ranks as many groups side by side as a register has lanes, M
// * M comparisons a group (1.5 to 2 ns an element with AVX-512). A larger M finds the (M - N)-th smallest key
// by 32 counting passes over the group's keys, bit by bit: never quadratic (3 ns an element).
#pragma once

#include "nm_block.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kNmBatch = 16;
constexpr int64_t kNmRankable = 32;

// As many groups side by side as a register holds: GCC 12 takes wider vectors apart element by element.
template <int bytes>
struct NmVector {
  typedef int32_t Type __attribute__((vector_size(bytes)));
};

template <Dtype dtype>
void nm_keys(const typename Element<dtype>::Bits* w, const float* norm, int64_t count, int32_t* keys) {
  for (int64_t j = 0; j < count; ++j) keys[j] = order_key(score_of(to_float<dtype>(w[j]), norm[j]));
}

// Byte j of `flags` (0 or 1) to bit j. Reads flags up to a multiple of eight.
inline void nm_pack_flags(const uint8_t* flags, int64_t count, NmBits& bits) {
  for (int64_t word = 0; word <= count / 64 && word < kNmBlock / 64; ++word) bits.word[word] = 0;
  for (int64_t j = 0; j < count; j += 8) {
    uint64_t eight;
    std::memcpy(&eight, flags + j, sizeof(eight));
    // Bit 8 i moves to bit 56 + i.
    bits.word[j / 64] |= (eight * 0x0102040810204080u >> 56) << (j % 64);
  }
}

template <class Vector, Dtype dtype>
void nm_rank(const typename Element<dtype>::Bits* w, const float* norm, int64_t groups, int m, int prune,
             NmBits& bits) {
  alignas(64) int32_t flat[kNmRankable * kNmBatch];
  alignas(64) int32_t keys[kNmRankable][kNmBatch];
  uint8_t flags[kNmRankable * kNmBatch + 8];
  std::memset(flags + groups * m, 0, 8);
  nm_keys<dtype>(w, norm, groups * m, flat);
  for (int64_t g = 0; g < groups; ++g) {
    for (int j = 0; j < m; ++j) keys[j][g] = flat[g * m + j];
  }
  for (int64_t g = groups; g < kNmBatch; ++g) {
    for (int j = 0; j < m; ++j) keys[j][g] = 0;
  }
  using Keys = typename NmVector<Vector::kBytes>::Type;
  constexpr int64_t kWidth = Vector::kBytes / 4;
  for (int64_t from = 0; from < groups; from += kWidth) {
    const int64_t to = groups - from < kWidth ? groups : from + kWidth;
    for (int j = 0; j < m; ++j) {
      Keys key;
      std::memcpy(&key, keys[j] + from, sizeof(key));
      Keys rank = {};  // minus the rank: a comparison that holds is -1
      for (int i = 0; i < m; ++i) {
        Keys other;
        std::memcpy(&other, keys[i] + from, sizeof(other));
        rank += i < j ? other <= key : other < key;
      }
      for (int64_t g = from; g < to; ++g) flags[g * m + j] = -rank[g - from] < prune;
    }
  }
  nm_pack_flags(flags, groups * m, bits);
}

inline int64_t nm_count_below(const int32_t* keys, int64_t count, int32_t bound) {
  int64_t total = 0;
  for (int64_t from = 0; from < count; from += 1 << 20) {
    const int64_t to = count - from < 1 << 20 ? count : from + (1 << 20);
    int32_t below = 0;
    for (int64_t j = from; j < to; ++j) below += keys[j] < bound;
    total += below;
  }
  return total;
}

// The prune-th smallest key, 1 <= prune < m, built bit by bit from the top (offset so that it orders
// unsigned), and in `below` how many keys are smaller.
inline int32_t nm_threshold(const int32_t* keys, int64_t m, int64_t prune, int64_t& below) {
  constexpr uint32_t kOffset = 0x80000000u;
  uint32_t threshold = 0;
  below = 0;
  for (uint32_t bit = kOffset; bit != 0; bit >>= 1) {
    const int64_t count = nm_count_below(keys, m, static_cast<int32_t>((threshold | bit) ^ kOffset));
    if (count < prune) {
      threshold |= bit;
      below = count;
    }
  }
  return static_cast<int32_t>(threshold ^ kOffset);
}

template <class Vector, Dtype dtype>
void nm_general(const NmParams& p, int64_t begin, int64_t end) {
  const auto* weight = static_cast<const typename Element<dtype>::Bits*>(p.weight);
  const int64_t prune = p.m - p.n;
  NmBuffer<int32_t> keys(p.m > kNmRankable ? p.m : 0);
  NmBits bits = {};
  for (int64_t row = begin; row < end; ++row) {
    const auto* w = weight + row * p.row_stride;
    NmSums sums;
    if (p.m <= kNmRankable) {
      for (int64_t column = 0; column < p.cols; column += kNmBatch * p.m) {
        const int64_t left = (p.cols - column) / p.m;
        const int64_t groups = left < kNmBatch ? left : kNmBatch;
        nm_rank<Vector, dtype>(w + column, p.norm + column, groups, static_cast<int>(p.m),
                               static_cast<int>(prune), bits);
        nm_apply<Vector, dtype>(p, row, column, groups * p.m, bits, sums);
      }
    } else {
      for (int64_t group = 0; group < p.cols; group += p.m) {
        nm_keys<dtype>(w + group, p.norm + group, p.m, keys.data());
        int64_t below;
        const int32_t threshold = nm_threshold(keys.data(), p.m, prune, below);
        int64_t equals =
            prune - below;  // still to prune among those equal to the threshold, lowest column first
        for (int64_t first = 0; first < p.m; first += kNmBlock) {
          const int64_t count = p.m - first < kNmBlock ? p.m - first : kNmBlock;
          uint8_t flags[kNmBlock + 8] = {};
          for (int64_t j = 0; j < count; ++j) {
            const int32_t key = keys.data()[first + j];
            const bool equal = key == threshold && equals > 0;
            equals -= equal;
            flags[j] = key < threshold || equal;
          }
          nm_pack_flags(flags, count, bits);
          nm_apply<Vector, dtype>(p, row, group + first, count, bits, sums);
        }
      }
    }
    if (p.score_sums != nullptr) sums.store(p.score_sums + 2 * row);
  }
}

}  // namespace
}  // namespace wanda::cpu

// Which elements of a group of 2, 4, 8, 16 or 32 to prune, for nm.cuh and pack_24.cuh.
#pragma once

#include "score.cuh"

namespace wanda::cuda {

// A full adder on 32 independent bits; each is one LOP3.
WANDA_DEVICE uint32_t majority(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | (c & (a | b)); }
WANDA_DEVICE uint32_t parity(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }

// Bit 31 of flag[i]: element i stays, being none of the kM - kept smallest, the lower index first among
// equals. `key`: scores' bits below 2^31, so bit 31 of key[j] - key[i] says that key j is smaller. One
// subtraction serves a pair both ways. Counting those bits by full adders makes 2:4 ten instructions for four
// elements (six subtractions, four LOP3) and 4:8 76 for eight; a sum of 0/1 ranks takes 28 and 120. kKept =
// 0: `kept` says how many at run time.
template <int kM, int kKept>
WANDA_DEVICE void keep_flags(const float (&score)[kM], uint32_t kept, uint32_t (&flag)[kM]) {
  uint32_t smaller[kM][kM];  // bit 31 of [i][j]: j goes before i
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = i + 1; j < kM; ++j) {
      smaller[i][j] = __float_as_uint(score[j]) - __float_as_uint(score[i]);
      smaller[j][i] = ~smaller[i][j];
    }
  }
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    uint32_t others[kM];  // the first kM - 1 are used
#pragma unroll
    for (int j = 0; j < kM - 1; ++j) others[j] = smaller[i][j < i ? j : j + 1];
    if constexpr (kM == 4 && kKept == 1) {
      flag[i] = others[0] & others[1] & others[2];
    } else if constexpr (kM == 4 && kKept == 2) {
      flag[i] = majority(others[0], others[1], others[2]);
    } else if constexpr (kM == 4 && kKept == 3) {
      flag[i] = others[0] | others[1] | others[2];
    } else if constexpr (kM == 8 && kKept == 4) {
      const uint32_t one = parity(others[0], others[1], others[2]);
      const uint32_t two = parity(others[3], others[4], others[5]);
      flag[i] = majority(majority(others[0], others[1], others[2]), majority(others[3], others[4], others[5]),
                         majority(one, two, others[6]));
    } else {
      uint32_t pruned = kM - kept - 1;
#pragma unroll
      for (int j = 0; j < kM - 1; ++j) pruned -= others[j] >> 31;
      flag[i] = pruned;  // negative: at least kM - kept go before it
    }
  }
}

// The same for scores of any sign, by comparisons.
template <int kM>
WANDA_DEVICE void keep_flags_any(const float (&score)[kM], uint32_t kept, uint32_t (&flag)[kM]) {
  uint32_t key[kM];
#pragma unroll
  for (int i = 0; i < kM; ++i) key[i] = ordered_key(score[i]);
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    uint32_t pruned = kM - kept - 1;
#pragma unroll
    for (int j = 0; j < kM; ++j) pruned -= j < i ? key[j] <= key[i] : key[j] < key[i];
    flag[i] = pruned;
  }
}

// Groups of 16 and 32, as keep_flags. A funnel shift collects the outcomes of an element in a word; those of
// the pairs in which it is the second, the first of them on top, are told the wrong way round.
template <int kM>
WANDA_DEVICE void keep_flags_wide(const float (&score)[kM], uint32_t kept, uint32_t (&flag)[kM]) {
  uint32_t smaller[kM] = {};
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = i + 1; j < kM; ++j) {
      const uint32_t is_smaller = __float_as_uint(score[j]) - __float_as_uint(score[i]);
      smaller[i] = __funnelshift_l(is_smaller, smaller[i], 1);
      smaller[j] = __funnelshift_l(is_smaller, smaller[j], 1);
    }
  }
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    const uint32_t as_second = ((1u << i) - 1) << (kM - 1 - i);
    flag[i] = kM - kept - 1 - __popc(smaller[i] ^ as_second);
  }
}

// kWidth / kM groups side by side; `any_sign` where a norm has its sign bit set.
template <int kM, int kKept, int kWidth>
WANDA_DEVICE void select_groups(const float (&score)[kWidth], uint32_t kept, bool any_sign,
                                uint32_t (&flag)[kWidth]) {
  const auto each_group = [&](auto flags_of) {
#pragma unroll
    for (int first = 0; first < kWidth; first += kM) {
      float group[kM];
      uint32_t group_flag[kM];
#pragma unroll
      for (int i = 0; i < kM; ++i) group[i] = score[first + i];
      flags_of(group, group_flag);
#pragma unroll
      for (int i = 0; i < kM; ++i) flag[first + i] = group_flag[i];
    }
  };
  if (any_sign) {
    each_group([&](const float (&group)[kM], uint32_t (&flags)[kM]) {
      keep_flags_any<kM>(group, kKept == 0 ? kept : kKept, flags);
    });
  } else {
    each_group([&](const float (&group)[kM], uint32_t (&flags)[kM]) {
      if constexpr (kM > 8) {
        keep_flags_wide<kM>(group, kept, flags);
      } else {
        keep_flags<kM, kKept>(group, kept, flags);
      }
    });
  }
}

WANDA_DEVICE uint32_t sign_bits(const float4& v) {
  return __float_as_uint(v.x) | __float_as_uint(v.y) | __float_as_uint(v.z) | __float_as_uint(v.w);
}

// The word's two 16-bit elements, or +0 for those whose flag has bit 31 clear: the permutation spreads that
// bit.
WANDA_DEVICE uint32_t keep_pair(uint32_t word, uint32_t low_flag, uint32_t high_flag) {
  return word & permute_bytes(low_flag, high_flag, 0xffbb);
}

}  // namespace wanda::cuda

// N:M selection's steps with AVX-512.
#pragma once

#include "nm_impl.h"
#include "vector_avx512.h"

namespace wanda::cpu {
namespace {

template <>
struct NmSteps<Avx512> {
  template <int r>
  static __m512i rotate(__m512i v) {
    return _mm512_shuffle_epi32(v, static_cast<_MM_PERM_ENUM>(r == 1 ? 0x39 : r == 2 ? 0x4e : 0x93));
  }
  static __m512i even_quads(__m512i a, __m512i b) { return _mm512_shuffle_i32x4(a, b, 0x88); }
  static __m512i odd_quads(__m512i a, __m512i b) { return _mm512_shuffle_i32x4(a, b, 0xdd); }

  static void store(uint64_t* words, int64_t at, __m512i a, __m512i b) {
    const uint16_t bits = _mm512_cmple_epi32_mask(a, b);
    std::memcpy(reinterpret_cast<char*>(words) + 2 * at, &bits, sizeof(bits));
  }

  // With a bias that makes lane 3 < lane 0.
  static void store_next(uint64_t* words, int64_t at, __m512i key) {
    const __m512i bias = _mm512_maskz_set1_epi32(0x8888, 1);
    store(words, at, _mm512_add_epi32(key, bias), rotate<1>(key));
  }

  static void zero_pruned(uint32_t* w, int64_t count, const NmBits& bits) {
    for (int64_t j = 0; j < count; j += 16) {
      const uint32_t valid = count - j >= 16 ? 0xffffu : (1u << (count - j)) - 1;
      const uint32_t pruned = static_cast<uint32_t>(bits.word[j / 64] >> (j % 64)) & valid;
      _mm512_mask_storeu_epi32(w + j, static_cast<__mmask16>(pruned), _mm512_setzero_si512());
    }
  }

  static void zero_pruned(uint16_t* w, int64_t count, const NmBits& bits) {
    int64_t j = 0;
    for (; j + 64 <= count; j += 64) {
      const uint64_t keep = ~bits.word[j / 64];
      _mm512_storeu_si512(w + j, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(keep), w + j));
      _mm512_storeu_si512(w + j + 32,
                          _mm512_maskz_loadu_epi16(static_cast<__mmask32>(keep >> 32), w + j + 32));
    }
    for (; j < count; j += 32) {
      const uint32_t valid = count - j >= 32 ? ~0u : (1u << (count - j)) - 1;
      const uint32_t pruned = static_cast<uint32_t>(bits.word[j / 64] >> (j % 64)) & valid;
      _mm512_mask_storeu_epi16(w + j, pruned, _mm512_setzero_si512());
    }
  }

  static void write_mask(bool* mask, int64_t count, const NmBits& bits) {
    for (int64_t j = 0; j < count; j += 64) {
      const uint64_t valid = count - j >= 64 ? ~uint64_t{0} : (uint64_t{1} << (count - j)) - 1;
      const __m512i bytes = _mm512_maskz_set1_epi8(bits.word[j / 64], 1);
      _mm512_mask_storeu_epi8(mask + j, valid, bytes);
    }
  }
};

// ---- bf16. A 32-bit lane holds two neighbours, and either is a float32 after one cheap operation: keys come
// as `even` and `odd` columns, without widening shuffles. 4:8 takes 4.1 ns per 32 columns in L1 so, and 6.0
// by the comparisons above (Zen 4, where memcpy from and to memory takes 5.6); 2:4 takes 3.4 instead of 3.5.

// The norms in that order: 16 even, then 16 odd columns of every 32, and zeros up to a whole number of units.
class NmPairedNorms {
 public:
  static constexpr int64_t kUnit = 128;

  NmPairedNorms(const float* norm, int64_t cols) : storage_((cols + kUnit - 1) / kUnit * kUnit + 16) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    norms_ = storage_.data() + (64 - address % 64) % 64 / sizeof(float);
    for (int64_t j = 0; j < (cols + kUnit - 1) / kUnit * kUnit; ++j) {
      const float value = j < cols ? norm[j] : 0.0f;
      norms_[place_in_pair<Avx512, Dtype::kBFloat16>(j)] = float_of_bits(bits_of_float(value) & 0x7fffffffu);
    }
  }
  const float* at(int64_t column) const { return norms_ + column; }

 private:
  NmBuffer<float> storage_;
  float* norms_;
};

// Keys of 32 columns. Products of magnitudes are positive or NaN, and NaN of either sign is clamped.
inline void nm_paired_keys(const uint16_t* w, const float* norms, __m512i& even, __m512i& odd) {
  const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(w), _mm512_set1_epi32(0x7fff7fff));
  const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(magnitude, 16));
  const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(magnitude, _mm512_set1_epi32(0x7fff0000)));
  const __m512i nan = _mm512_set1_epi32(0x7f800001);
  even = _mm512_min_epu32(_mm512_castps_si512(_mm512_mul_ps(low, _mm512_load_ps(norms))), nan);
  odd = _mm512_min_epu32(_mm512_castps_si512(_mm512_mul_ps(high, _mm512_load_ps(norms + 16))), nan);
}

// Bit j: column j is pruned, from the signs of the even and odd lanes.
inline uint32_t nm_paired_bits(__m512i even, __m512i odd) {
  return _mm512_movepi16_mask(_mm512_mask_mov_epi16(_mm512_srli_epi32(even, 16), 0xaaaaaaaau, odd));
}

// The immediate of a ternary logic instruction: at least n of (a ^ flip_a, b ^ flip_b, c).
constexpr int nm_ternary(int n, bool flip_a, bool flip_b) {
  int immediate = 0;
  for (int i = 0; i < 8; ++i) {
    const int a = (i >> 2 & 1) ^ static_cast<int>(flip_a);
    const int b = (i >> 1 & 1) ^ static_cast<int>(flip_b);
    immediate |= (a + b + (i & 1) >= n) << i;
  }
  return immediate;
}

// N:4. A 64-bit lane is a group: even = (0, 2), odd = (1, 3). Every comparison is the sign of a difference,
// with a bias of 1 where a tie counts; the sum of an element's three is taken by majority (or OR, or AND).
template <int n>
uint32_t nm_paired_4(const uint16_t* w, const float* norms) {
  __m512i even;
  __m512i odd;
  nm_paired_keys(w, norms, even, odd);
  const __m512i bias = _mm512_maskz_set1_epi32(0x5555, 1);
  const __m512i even_biased = _mm512_sub_epi32(even, bias);
  const __m512i odd_biased = _mm512_sub_epi32(odd, bias);
  const __m512i even_swapped = _mm512_rol_epi64(even, 32);
  const __m512i odd_swapped = _mm512_rol_epi64(odd, 32);
  const __m512i neighbours = _mm512_sub_epi32(odd, even);              // 1 before 0, 3 before 2
  const __m512i crossed = _mm512_sub_epi32(even_biased, odd_swapped);  // 0 before 3, 2 before 1
  const __m512i evens = _mm512_sub_epi32(even_biased, even_swapped);   // 0 before 2, 2 before 0
  const __m512i odds = _mm512_sub_epi32(odd_biased, odd_swapped);      // 1 before 3, 3 before 1
  const __m512i crossed_swapped = _mm512_rol_epi64(crossed, 32);       // 2 before 1, 0 before 3
  constexpr int kEven = nm_ternary(n, true, false);
  constexpr int kOdd = nm_ternary(n, false, true);
  return nm_paired_bits(_mm512_ternarylogic_epi32(neighbours, evens, crossed, kEven),
                        _mm512_ternarylogic_epi32(neighbours, crossed_swapped, odds, kOdd));
}

// Each line of the weights and norms is asked for 1 KiB ahead: worth 5 to 15 % of the time.
inline void nm_paired_prefetch(const void* at) {
  _mm_prefetch(static_cast<const char*>(at) + 1024, _MM_HINT_T0);
}

class NmSelectPaired4 {
 public:
  static constexpr int kRows = kNmRows;

  NmSelectPaired4(const float* norm, int64_t cols, int64_t n) : norms_(norm, cols), n_(n) {}

  template <int rows>
  void run(const uint16_t* const* w, int64_t column, int64_t count, NmBits* bits) {
    n_ == 1   ? run_n<1, rows>(w, column, count, bits)
    : n_ == 2 ? run_n<2, rows>(w, column, count, bits)
              : run_n<3, rows>(w, column, count, bits);
  }

 private:
  template <int n, int rows>
  void run_n(const uint16_t* const* w, int64_t column, int64_t count, NmBits* bits) {
    const float* norms = norms_.at(column);
    int64_t j = 0;
    for (; j + 32 <= count; j += 32) {
      nm_paired_prefetch(norms + j);
      nm_paired_prefetch(norms + j + 16);
      for (int r = 0; r < rows; ++r) {
        nm_paired_prefetch(w[r] + j);
        store(bits[r], j, nm_paired_4<n>(w[r] + j, norms + j));
      }
    }
    for (int r = 0; r < rows && j < count; ++r) store(bits[r], j, last<n>(w[r] + j, norms + j, count - j));
  }

  // Fewer than 32 columns.
  template <int n>
  static uint32_t last(const uint16_t* w, const float* norms, int64_t count) {
    uint16_t padded[32] = {};
    std::memcpy(padded, w, static_cast<size_t>(count) * sizeof(*w));
    return nm_paired_4<n>(padded, norms);
  }

  static void store(NmBits& bits, int64_t j, uint32_t pruned) {
    std::memcpy(reinterpret_cast<char*>(bits.word) + j / 8, &pruned, sizeof(pruned));
  }

  NmPairedNorms norms_;
  int64_t n_;
};

// 4:8 by threshold. A 128-bit lane is a group: even = (0, 2, 4, 6), odd = (1, 3, 5, 7). The fourth smallest
// key comes from a merging network on four registers of 32 columns each, transposed, and all keys up to it
// are pruned. With a tie at the threshold that is too many: the count shows it, and the block is decided
// again by comparisons.
inline void nm_transpose_4(__m512i (&v)[4]) {
  const __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]);
  const __m512i high01 = _mm512_unpackhi_epi32(v[0], v[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]);
  const __m512i high23 = _mm512_unpackhi_epi32(v[2], v[3]);
  v[0] = _mm512_unpacklo_epi64(low01, low23);
  v[1] = _mm512_unpackhi_epi64(low01, low23);
  v[2] = _mm512_unpacklo_epi64(high01, high23);
  v[3] = _mm512_unpackhi_epi64(high01, high23);
}

// Sorts the four keys of two sorted pairs (low0 <= high0, low1 <= high1) into out[0] <= .. <= out[3].
inline void nm_merge_pairs(__m512i low0, __m512i high0, __m512i low1, __m512i high1, __m512i (&out)[4]) {
  const __m512i middle0 = _mm512_max_epi32(low0, low1);
  const __m512i middle1 = _mm512_min_epi32(high0, high1);
  out[0] = _mm512_min_epi32(low0, low1);
  out[1] = _mm512_min_epi32(middle0, middle1);
  out[2] = _mm512_max_epi32(middle0, middle1);
  out[3] = _mm512_max_epi32(high0, high1);
}

inline void nm_threshold_48(const uint16_t* w, const float* norms, uint32_t (&pruned)[4]) {
  __m512i even[4];
  __m512i odd[4];
  __m512i low[4];
  __m512i high[4];
  for (int i = 0; i < 4; ++i) {
    nm_paired_keys(w + 32 * i, norms + 32 * i, even[i], odd[i]);
    low[i] = _mm512_min_epi32(even[i], odd[i]);
    high[i] = _mm512_max_epi32(even[i], odd[i]);
  }
  nm_transpose_4(low);
  nm_transpose_4(high);
  __m512i a[4];
  __m512i b[4];
  nm_merge_pairs(low[0], high[0], low[1], high[1], a);
  nm_merge_pairs(low[2], high[2], low[3], high[3], b);
  const __m512i fourth =
      _mm512_max_epi32(_mm512_max_epi32(_mm512_min_epi32(a[0], b[3]), _mm512_min_epi32(a[1], b[2])),
                       _mm512_max_epi32(_mm512_min_epi32(a[2], b[1]), _mm512_min_epi32(a[3], b[0])));
  const __m512i limit = _mm512_add_epi32(fourth, _mm512_set1_epi32(1));
  const __m512i limits[4] = {
      _mm512_shuffle_epi32(limit, _MM_PERM_AAAA), _mm512_shuffle_epi32(limit, _MM_PERM_BBBB),
      _mm512_shuffle_epi32(limit, _MM_PERM_CCCC), _mm512_shuffle_epi32(limit, _MM_PERM_DDDD)};
  for (int i = 0; i < 4; ++i) {
    pruned[i] = nm_paired_bits(_mm512_sub_epi32(even[i], limits[i]), _mm512_sub_epi32(odd[i], limits[i]));
  }
}

class NmSelectPaired8 {
 public:
  static constexpr int kRows = 1;  // side by side, two or four rows took 1.1-1.5 x memcpy, one 0.9-1.3

  NmSelectPaired8(const float* norm, int64_t cols, int64_t n)
      : norms_(norm, n == 4 ? cols : 0), exact_(norm, cols, n), exact_blocks_(n == 4 ? 0 : INT64_MAX) {}

  template <int rows>
  void run(const uint16_t* const* w, int64_t column, int64_t count, NmBits* bits) {
    if (exact_blocks_ > 0) {
      --exact_blocks_;
      exact_.template run<rows>(w, column, count, bits);
      return;
    }
    const float* norms = norms_.at(column);
    int64_t pruned[rows] = {};
    for (int64_t j = 0; j < count; j += 128) {
      for (int64_t i = 0; i < 128; i += 16) nm_paired_prefetch(norms + j + i);
      for (int64_t i = 0; i < 128 * rows; i += 32) nm_paired_prefetch(w[i / 128] + j + i % 128);
      for (int r = 0; r < rows; ++r)
        pruned[r] += threshold(w[r] + j, norms + j, count - j, bits[r].word + j / 64);
    }
    for (int r = 0; r < rows; ++r) {
      if (pruned[r] == count / 2) continue;
      exact_.template run<1>(w + r, column, count, bits + r);
      exact_blocks_ = kBlocksAfterTie;
    }
  }

 private:
  // A tie is rare unless the weights are coarse and the norms equal, or many weights are zero; then most
  // blocks have one, and trying the threshold on one block in 16 costs little.
  static constexpr int64_t kBlocksAfterTie = 15;

  // Up to 128 columns. Returns how many are pruned.
  static int64_t threshold(const uint16_t* w, const float* norms, int64_t count, uint64_t* bits) {
    uint32_t pruned[4];
    if (count >= 128) {
      nm_threshold_48(w, norms, pruned);
      std::memcpy(bits, pruned, sizeof(pruned));
    } else {
      uint16_t last[128] = {};
      std::memcpy(last, w, static_cast<size_t>(count) * sizeof(*w));
      nm_threshold_48(last, norms, pruned);
      std::memcpy(bits, pruned, sizeof(pruned));
      bits[0] &= count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
      bits[1] &= count > 64 ? (uint64_t{1} << (count - 64)) - 1 : 0;
    }
    return __builtin_popcountll(bits[0]) + __builtin_popcountll(bits[1]);
  }

  NmPairedNorms norms_;
  NmSelect<Avx512, Dtype::kBFloat16, 8> exact_;
  int64_t exact_blocks_;  // to decide by comparisons before the threshold is tried again
};

template <>
struct NmSelectFor<Avx512, Dtype::kBFloat16, 4> {
  using Type = NmSelectPaired4;
};
template <>
struct NmSelectFor<Avx512, Dtype::kBFloat16, 8> {
  using Type = NmSelectPaired8;
};

}  // namespace
}  // namespace wanda::cpu

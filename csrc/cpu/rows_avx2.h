// Row selection's steps with AVX2 (and F16C).
#pragma once

#include "rows_vector.h"
#include "vector_avx2.h"

namespace wanda::cpu {
namespace {

// Two vectors of 8 float32 make one vector of 16 keys, as in rows_avx512.h.
template <>
struct RowsSteps<Avx2> : RowsVectorSteps<Avx2> {
  typedef int32_t Lanes __attribute__((vector_size(32)));

  WANDA_STEP static __m256i keys_of(Avx2::Pair s) {
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(s.a), 16);
    return _mm256_and_si256(_mm256_blend_epi16(low, _mm256_castps_si256(s.b), 0xaa),
                            _mm256_set1_epi16(0x7fff));
  }

  static __m256i all_of_16(int value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }
  WANDA_STEP static void store_keys(uint16_t* keys, __m256i x) { store_256(keys, x); }
  WANDA_STEP static __m256i add_clamped(__m256i sum, __m256i keys, __m256i low, __m256i most) {
    return _mm256_add_epi16(sum, _mm256_min_epu16(_mm256_subs_epu16(keys, low), most));
  }

  WANDA_STEP static __m256i add_halves(__m256i sum, __m256i x) {
    sum = _mm256_add_epi32(sum, _mm256_srli_epi32(x, 16));
    return _mm256_add_epi32(sum, _mm256_and_si256(x, _mm256_set1_epi32(0xffff)));
  }
  static int64_t sum_of(__m256i x) {
    alignas(32) uint32_t lanes[8];
    store_256(lanes, x);
    int64_t sum = 0;
    for (const uint32_t lane : lanes) sum += lane;
    return sum;
  }

  template <Dtype D>
  static void count(const uint16_t* keys, int64_t blocks, const int32_t* limits, int64_t* counts,
                    const char* next) {
    if (limits[kLimits - 1] - limits[0] < 15) {
      count_near<D>(keys, blocks, limits, counts, next);
    } else {
      count_far(keys, blocks, limits, counts);
    }
  }

  // All limits within 15 keys: four byte look-ups say for each key, as pairs of 4-bit counters, which limits
  // it is below.
  template <Dtype D>
  WANDA_PASS static void count_near(const uint16_t* keys, int64_t blocks, const int32_t* limits,
                                    int64_t* counts, const char* next) {
    const __m256i iota = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4,
                                          5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const int32_t start = limits[0] - 1;
    const __m256i origin = _mm256_set1_epi16(static_cast<int16_t>(start));
    __m256i table[4], sum[kLimits];
    for (int t = 0; t < kLimits; ++t) {
      const __m256i less = _mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(limits[t] - start)), iota);
      const __m256i one = _mm256_and_si256(less, _mm256_set1_epi8(t < 4 ? 1 : 16));
      table[t % 4] = t < 4 ? one : _mm256_or_si256(table[t % 4], one);
      sum[t] = _mm256_setzero_si256();
    }
    const __m256i most = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    for (int64_t first = 0; first < blocks; first += 7) {
      const int64_t stop = min_of(blocks, first + 7) * kBlock;
      __m256i c0 = zero, c1 = zero, c2 = zero, c3 = zero;
      for (int64_t i = first * kBlock; i < stop; i += 32) {
        const __m256i x = _mm256_sub_epi16(load_256(keys + i), origin);
        const __m256i y = _mm256_sub_epi16(load_256(keys + i + 16), origin);
        const __m256i at = _mm256_min_epu8(_mm256_packus_epi16(x, y), most);
        c0 = _mm256_add_epi8(c0, _mm256_shuffle_epi8(table[0], at));
        c1 = _mm256_add_epi8(c1, _mm256_shuffle_epi8(table[1], at));
        c2 = _mm256_add_epi8(c2, _mm256_shuffle_epi8(table[2], at));
        c3 = _mm256_add_epi8(c3, _mm256_shuffle_epi8(table[3], at));
        if (i % kBlock == 0) prefetch<D>(next, i / kBlock);
      }
      const __m256i c[4] = {c0, c1, c2, c3};
      for (int t = 0; t < 4; ++t) {
        const __m256i low = _mm256_and_si256(c[t], most);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(c[t], 4), most);
        sum[t] = _mm256_add_epi64(sum[t], _mm256_sad_epu8(low, zero));
        sum[t + 4] = _mm256_add_epi64(sum[t + 4], _mm256_sad_epu8(high, zero));
      }
    }
    for (int t = 0; t < kLimits; ++t) {
      const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum[t]), _mm256_extracti128_si256(sum[t], 1));
      counts[t] = _mm_extract_epi64(half, 0) + _mm_extract_epi64(half, 1);
    }
  }

  WANDA_PASS static void count_far(const uint16_t* keys, int64_t blocks, const int32_t* limits,
                                   int64_t* counts) {
    __m256i last[kLimits];
    for (int t = 0; t < kLimits; ++t) {
      last[t] = _mm256_set1_epi16(static_cast<int16_t>(limits[t] - 1));
      counts[t] = blocks * kBlock;
    }
    for (int64_t first = 0; first < blocks; first += 1 << 13) {
      // Spelled out: GCC keeps an array of accumulators in memory.
      __m256i c0 = _mm256_setzero_si256(), c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0;
      const int64_t stop = min_of(blocks, first + (1 << 13)) * kBlock;
      for (int64_t i = first * kBlock; i < stop; i += 16) {
        const __m256i x = load_256(keys + i);
        c0 = _mm256_sub_epi16(c0, _mm256_cmpgt_epi16(x, last[0]));
        c1 = _mm256_sub_epi16(c1, _mm256_cmpgt_epi16(x, last[1]));
        c2 = _mm256_sub_epi16(c2, _mm256_cmpgt_epi16(x, last[2]));
        c3 = _mm256_sub_epi16(c3, _mm256_cmpgt_epi16(x, last[3]));
        c4 = _mm256_sub_epi16(c4, _mm256_cmpgt_epi16(x, last[4]));
        c5 = _mm256_sub_epi16(c5, _mm256_cmpgt_epi16(x, last[5]));
        c6 = _mm256_sub_epi16(c6, _mm256_cmpgt_epi16(x, last[6]));
        c7 = _mm256_sub_epi16(c7, _mm256_cmpgt_epi16(x, last[7]));
      }
      const __m256i none = _mm256_setzero_si256();
      counts[0] -= sum_of(add_halves(none, c0));
      counts[1] -= sum_of(add_halves(none, c1));
      counts[2] -= sum_of(add_halves(none, c2));
      counts[3] -= sum_of(add_halves(none, c3));
      counts[4] -= sum_of(add_halves(none, c4));
      counts[5] -= sum_of(add_halves(none, c5));
      counts[6] -= sum_of(add_halves(none, c6));
      counts[7] -= sum_of(add_halves(none, c7));
    }
  }

  // 0xffff for each key in (below, last].
  WANDA_STEP static __m256i in_range(__m256i key, __m256i below, __m256i last) {
    return _mm256_andnot_si256(_mm256_cmpgt_epi16(key, last), _mm256_cmpgt_epi16(key, below));
  }

  // Prunes 32 columns; bit i: key i is in the range.
  template <Dtype D, bool kMask, bool kSums>
  WANDA_STEP static uint32_t write_32(typename Element<D>::Bits* w, bool* mask, const uint16_t* keys,
                                      const float* norm, const Range& range, VectorSums& sums) {
    const __m256i x = load_256(keys), y = load_256(keys + 16);
    const __m256i hits =
        _mm256_permute4x64_epi64(_mm256_packs_epi16(in_range(x, range.below16, range.last16),
                                                    in_range(y, range.below16, range.last16)),
                                 0xd8);
    write_16<D, kMask, kSums>(w, mask, norm, x, range, sums);
    write_16<D, kMask, kSums>(w + 16, mask + 16, norm + 16, y, range, sums);
    return static_cast<uint32_t>(_mm256_movemask_epi8(hits));
  }

  template <Dtype D, bool kMask, bool kSums>
  WANDA_STEP static void write_16(typename Element<D>::Bits* w, bool* mask, const float* norm, __m256i key,
                                  const Range& range, VectorSums& sums) {
    __m256i keep = _mm256_cmpgt_epi16(key, range.below16), keep_a = keep, keep_b = keep;
    if constexpr (D != Dtype::kBFloat16 || kSums) {
      keep_a = _mm256_cmpgt_epi32(_mm256_slli_epi32(key, 16), range.below32);
      keep_b = _mm256_cmpgt_epi32(key, range.below32);
    }
    if constexpr (kSums) {
      const Avx2::Pair s = scores<D>(w, norm);
      const __m256 a = _mm256_mul_ps(s.a, s.a), b = _mm256_mul_ps(s.b, s.b);
      sums.all = _mm256_add_ps(sums.all, _mm256_add_ps(a, b));
      sums.pruned = _mm256_add_ps(sums.pruned, _mm256_andnot_ps(_mm256_castsi256_ps(keep_a), a));
      sums.pruned = _mm256_add_ps(sums.pruned, _mm256_andnot_ps(_mm256_castsi256_ps(keep_b), b));
    }
    if constexpr (!kMask && D == Dtype::kFloat32) {
      store_256(w, _mm256_and_si256(load_256(w), keep_a));
      store_256(w + 8, _mm256_and_si256(load_256(w + 8), keep_b));
      return;
    }
    if constexpr (D != Dtype::kBFloat16) {
      keep = _mm256_permute4x64_epi64(_mm256_packs_epi32(keep_a, keep_b), 0xd8);
    }
    if constexpr (kMask) {
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(keep), _mm256_extracti128_si256(keep, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(mask), _mm_add_epi8(bytes, _mm_set1_epi8(1)));
    } else {
      store_256(w, _mm256_and_si256(load_256(w), keep));
    }
  }
};

}  // namespace
}  // namespace wanda::cpu

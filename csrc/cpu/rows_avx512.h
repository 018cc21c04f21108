// Row selection's steps with AVX-512 (F, BW, DQ, VL).
#pragma once

#include "rows_vector.h"
#include "vector_avx512.h"

namespace wanda::cpu {
namespace {

// Two vectors of 16 float32 make one vector of 32 keys: the top halves of `a` go to the low, those of `b` to
// the high half of each 32-bit lane. bfloat16: a = even, b = odd columns, so keys are in column order.
// Others: a = columns 0-15, b = 16-31.
template <>
struct RowsSteps<Avx512> : RowsVectorSteps<Avx512> {
  typedef int32_t Lanes __attribute__((vector_size(64)));

  WANDA_STEP static __m512i keys_of(Avx512::Pair s) {
    // (a >> 16 | b & 0xffff0000) & 0x7fff7fff: the sign goes with the weight's sign and with that of a NaN.
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(s.a), 16);
    const __m512i both =
        _mm512_ternarylogic_epi32(low, _mm512_castps_si512(s.b), _mm512_set1_epi32(-65536), 0xf8);
    return _mm512_and_si512(both, _mm512_set1_epi32(0x7fff7fff));
  }

  static __m512i all_of_16(int value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }
  WANDA_STEP static void store_keys(uint16_t* keys, __m512i x) { _mm512_store_si512(keys, x); }
  WANDA_STEP static __m512i add_clamped(__m512i sum, __m512i keys, __m512i low, __m512i most) {
    return _mm512_add_epi16(sum, _mm512_min_epu16(_mm512_subs_epu16(keys, low), most));
  }

  WANDA_STEP static __m512i add_halves(__m512i sum, __m512i x) {
    sum = _mm512_add_epi32(sum, _mm512_srli_epi32(x, 16));
    return _mm512_add_epi32(sum, _mm512_and_si512(x, _mm512_set1_epi32(0xffff)));
  }
  static int64_t sum_of(__m512i x) {
    return _mm512_reduce_add_epi64(
        _mm512_add_epi64(_mm512_srli_epi64(x, 32), _mm512_and_si512(x, _mm512_set1_epi64(0xffffffffu))));
  }

  template <Dtype D>
  static void count(const uint16_t* keys, int64_t blocks, const int32_t* limits, int64_t* counts,
                    const char* next) {
    for (int t = 0; t < kLimits; ++t) counts[t] = 0;
    for (int64_t first = 0; first < blocks; first += 1 << 13) {
      const int64_t part = min_of(blocks - first, 1 << 13);
      if (limits[kLimits - 1] - limits[0] < 31) {
        count_near<D>(keys + first * kBlock, part, limits, counts, next);
      } else {
        count_far(keys + first * kBlock, part, limits, counts);
      }
    }
  }

  WANDA_PASS static void count_far(const uint16_t* keys, int64_t blocks, const int32_t* limits,
                                   int64_t* counts) {
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i l0 = _mm512_set1_epi16(static_cast<int16_t>(limits[0])),
                  l1 = _mm512_set1_epi16(static_cast<int16_t>(limits[1]));
    const __m512i l2 = _mm512_set1_epi16(static_cast<int16_t>(limits[2])),
                  l3 = _mm512_set1_epi16(static_cast<int16_t>(limits[3]));
    const __m512i l4 = _mm512_set1_epi16(static_cast<int16_t>(limits[4])),
                  l5 = _mm512_set1_epi16(static_cast<int16_t>(limits[5]));
    const __m512i l6 = _mm512_set1_epi16(static_cast<int16_t>(limits[6])),
                  l7 = _mm512_set1_epi16(static_cast<int16_t>(limits[7]));
    __m512i c0 = _mm512_setzero_si512(), c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0;
    for (int64_t i = 0; i < blocks * kBlock; i += 32) {
      const __m512i x = _mm512_load_si512(keys + i);
      c0 = _mm512_mask_add_epi16(c0, _mm512_cmplt_epi16_mask(x, l0), c0, one);
      c1 = _mm512_mask_add_epi16(c1, _mm512_cmplt_epi16_mask(x, l1), c1, one);
      c2 = _mm512_mask_add_epi16(c2, _mm512_cmplt_epi16_mask(x, l2), c2, one);
      c3 = _mm512_mask_add_epi16(c3, _mm512_cmplt_epi16_mask(x, l3), c3, one);
      c4 = _mm512_mask_add_epi16(c4, _mm512_cmplt_epi16_mask(x, l4), c4, one);
      c5 = _mm512_mask_add_epi16(c5, _mm512_cmplt_epi16_mask(x, l5), c5, one);
      c6 = _mm512_mask_add_epi16(c6, _mm512_cmplt_epi16_mask(x, l6), c6, one);
      c7 = _mm512_mask_add_epi16(c7, _mm512_cmplt_epi16_mask(x, l7), c7, one);
    }
    add_counts({c0, c1, c2, c3, c4, c5, c6, c7}, counts);
  }

  // Adds up eight vectors of counts that are below 2^15: a transpose, so that there is one reduction, not
  // eight.
  static void add_counts(const __m512i (&c)[kLimits], int64_t* counts) {
    const __m512i one = _mm512_set1_epi16(1);
    __m512i four[2];
    for (int half = 0; half < 2; ++half) {
      const __m512i* q = c + 4 * half;
      const __m512i s0 = _mm512_madd_epi16(q[0], one), s1 = _mm512_madd_epi16(q[1], one);
      const __m512i s2 = _mm512_madd_epi16(q[2], one), s3 = _mm512_madd_epi16(q[3], one);
      const __m512i s01 = _mm512_add_epi32(_mm512_unpacklo_epi32(s0, s1), _mm512_unpackhi_epi32(s0, s1));
      const __m512i s23 = _mm512_add_epi32(_mm512_unpacklo_epi32(s2, s3), _mm512_unpackhi_epi32(s2, s3));
      four[half] = _mm512_add_epi32(_mm512_unpacklo_epi64(s01, s23), _mm512_unpackhi_epi64(s01, s23));
    }
    // 128-bit lanes: (a0 a1 a2 a3), (b0 b1 b2 b3) -> (a0 + a2, a1 + a3, b0 + b2, b1 + b3) -> (a, b).
    const __m512i pair = _mm512_add_epi32(_mm512_shuffle_i64x2(four[0], four[1], 0x44),
                                          _mm512_shuffle_i64x2(four[0], four[1], 0xee));
    const __m512i sums =
        _mm512_add_epi32(_mm512_shuffle_i64x2(pair, pair, 0x08), _mm512_shuffle_i64x2(pair, pair, 0x0d));
    _mm512_storeu_si512(counts, _mm512_add_epi64(_mm512_loadu_si512(counts),
                                                 _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sums))));
  }

  // All limits within 31 keys: two table look-ups say for each key, as four 4-bit counters, which limits it
  // is below.
  template <Dtype D>
  WANDA_PASS static void count_near(const uint16_t* keys, int64_t blocks, const int32_t* limits,
                                    int64_t* counts, const char* next) {
    const __m512i iota = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15,
                                          14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i origin = _mm512_set1_epi16(static_cast<int16_t>(limits[0] - 1));
    const __m512i at = _mm512_add_epi16(origin, iota);
    __m512i table_a = _mm512_setzero_si512(), table_b = table_a;
    for (int t = 0; t < 4; ++t) {
      const __m512i bit = _mm512_set1_epi16(static_cast<int16_t>(1 << (4 * t)));
      table_a = _mm512_mask_add_epi16(
          table_a, _mm512_cmplt_epi16_mask(at, _mm512_set1_epi16(static_cast<int16_t>(limits[t]))), table_a,
          bit);
      table_b = _mm512_mask_add_epi16(
          table_b, _mm512_cmplt_epi16_mask(at, _mm512_set1_epi16(static_cast<int16_t>(limits[t + 4]))),
          table_b, bit);
    }
    const __m512i most = _mm512_set1_epi16(31), nibble = _mm512_set1_epi16(15);
    __m512i c0 = _mm512_setzero_si512(), c1 = c0, c2 = c0, c3 = c0, c4 = c0, c5 = c0, c6 = c0, c7 = c0;
    for (int64_t first = 0; first < blocks * kBlock; first += 14 * 32) {
      const int64_t stop = min_of(blocks * kBlock, first + 14 * 32);
      __m512i a = _mm512_setzero_si512(), b = a;
      for (int64_t i = first; i < stop; i += kBlock) {
        const __m512i x = _mm512_min_epu16(_mm512_subs_epu16(_mm512_load_si512(keys + i), origin), most);
        const __m512i y = _mm512_min_epu16(_mm512_subs_epu16(_mm512_load_si512(keys + i + 32), origin), most);
        a = _mm512_add_epi16(a, _mm512_permutexvar_epi16(x, table_a));
        b = _mm512_add_epi16(b, _mm512_permutexvar_epi16(x, table_b));
        a = _mm512_add_epi16(a, _mm512_permutexvar_epi16(y, table_a));
        b = _mm512_add_epi16(b, _mm512_permutexvar_epi16(y, table_b));
        prefetch<D>(next, i / kBlock);
      }
      c0 = _mm512_add_epi16(c0, _mm512_and_si512(a, nibble));
      c1 = _mm512_add_epi16(c1, _mm512_and_si512(_mm512_srli_epi16(a, 4), nibble));
      c2 = _mm512_add_epi16(c2, _mm512_and_si512(_mm512_srli_epi16(a, 8), nibble));
      c3 = _mm512_add_epi16(c3, _mm512_srli_epi16(a, 12));
      c4 = _mm512_add_epi16(c4, _mm512_and_si512(b, nibble));
      c5 = _mm512_add_epi16(c5, _mm512_and_si512(_mm512_srli_epi16(b, 4), nibble));
      c6 = _mm512_add_epi16(c6, _mm512_and_si512(_mm512_srli_epi16(b, 8), nibble));
      c7 = _mm512_add_epi16(c7, _mm512_srli_epi16(b, 12));
    }
    add_counts({c0, c1, c2, c3, c4, c5, c6, c7}, counts);
  }

  // Prunes 32 columns; bit i: key i is in the range.
  template <Dtype D, bool kMask, bool kSums>
  WANDA_STEP static uint32_t write_32(typename Element<D>::Bits* w, bool* mask, const uint16_t* keys,
                                      const float* norm, const Range& range, VectorSums& sums) {
    const __m512i x = _mm512_load_si512(keys);
    const __mmask32 above = _mm512_cmpgt_epi16_mask(x, range.below16);
    const uint32_t inside = _mm512_mask_cmple_epi16_mask(above, x, range.last16);
    __mmask16 keep_a = 0, keep_b = 0;
    if constexpr (D != Dtype::kBFloat16 || kSums) {
      keep_a = _mm512_cmpgt_epi32_mask(_mm512_slli_epi32(x, 16), range.below32);
      keep_b = _mm512_cmpgt_epi32_mask(x, range.below32);
    }
    if constexpr (kSums) {
      const Avx512::Pair s = scores<D>(w, norm);
      sums.all = _mm512_fmadd_ps(s.a, s.a, _mm512_fmadd_ps(s.b, s.b, sums.all));
      sums.pruned = _mm512_mask3_fmadd_ps(s.a, s.a, sums.pruned, static_cast<__mmask16>(~keep_a));
      sums.pruned = _mm512_mask3_fmadd_ps(s.b, s.b, sums.pruned, static_cast<__mmask16>(~keep_b));
    }
    if constexpr (!kMask && D == Dtype::kFloat32) {
      _mm512_storeu_si512(w, _mm512_maskz_loadu_epi32(keep_a, w));
      _mm512_storeu_si512(w + 16, _mm512_maskz_loadu_epi32(keep_b, w + 16));
    } else {
      __mmask32 keep = above;
      if constexpr (D != Dtype::kBFloat16) keep = _mm512_kunpackw(keep_b, keep_a);
      if constexpr (kMask) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask),
                            _mm256_maskz_set1_epi8(static_cast<__mmask32>(~keep), 1));
      } else {
        _mm512_storeu_si512(w, _mm512_maskz_loadu_epi16(keep, w));
      }
    }
    return inside;
  }
};

}  // namespace
}  // namespace wanda::cpu

// Row selection for AVX-512 (F, BW, DQ, VL); the driver is in rows_impl.h.
#include "rows.h"

#if defined(__x86_64__)
#if !defined( \
    __clang__)  // GCC 12 takes the undefined sources inside its own intrinsics for a bug (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>
#include <cstring>
#include <new>

#include "target_avx512_begin.h"

#include "rows_impl.h"

namespace wanda::cpu {
namespace {

// Two vectors of 16 float32 make one vector of 32 keys: the top halves of `a` go to the low, those of `b` to
// the high half of each 32-bit lane. bfloat16: a = even, b = odd columns, so keys are in column order.
// Others: a = columns 0-15, b = 16-31.
struct Pair {
  __m512 a, b;
};

struct Avx512 {
  typedef int32_t Lanes __attribute__((vector_size(64)));

  template <Dtype D>
  static constexpr int kLanes = D == Dtype::kBFloat16 ? 0 : 16;

  template <Dtype D>
  static Pair load(const typename Element<D>::Bits* w) {
    if constexpr (D == Dtype::kFloat32) {
      return {_mm512_loadu_ps(reinterpret_cast<const float*>(w)),
              _mm512_loadu_ps(reinterpret_cast<const float*>(w + 16))};
    } else if constexpr (D == Dtype::kBFloat16) {
      const __m512i raw = _mm512_loadu_si512(w);
      return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
              _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(-65536)))};
    } else {
      return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))),
              _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 16)))};
    }
  }

  template <Dtype D>
  static Pair scores(const typename Element<D>::Bits* w, const float* norm) {
    const Pair x = load<D>(w);
    return {_mm512_mul_ps(x.a, _mm512_load_ps(norm)), _mm512_mul_ps(x.b, _mm512_load_ps(norm + 16))};
  }

  template <Dtype D>
  static void arrange_norm(const float* norm, float* out, int64_t blocks) {
    if constexpr (D == Dtype::kBFloat16) {
      for (int64_t i = 0; i < blocks * kBlock; i += 32) {
        for (int64_t j = 0; j < 16; ++j) {
          out[i + j] = norm[i + 2 * j];
          out[i + 16 + j] = norm[i + 2 * j + 1];
        }
      }
    } else {
      std::memcpy(out, norm, static_cast<size_t>(blocks * kBlock) * sizeof(float));
    }
  }

  template <Dtype D>
  static __m512i keys_of(const typename Element<D>::Bits* w, const float* norm) {
    const Pair s = scores<D>(w, norm);
    // (a >> 16 | b & 0xffff0000) & 0x7fff7fff: the sign goes with the weight's sign and with that of a NaN.
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(s.a), 16);
    const __m512i both =
        _mm512_ternarylogic_epi32(low, _mm512_castps_si512(s.b), _mm512_set1_epi32(-65536), 0xf8);
    return _mm512_and_si512(both, _mm512_set1_epi32(0x7fff7fff));
  }

  template <Dtype D>
  static int64_t make_keys(const typename Element<D>::Bits* w, const float* norm, uint16_t* keys,
                           int64_t blocks, int base, int span) {
    const __m512i low = _mm512_set1_epi16(static_cast<int16_t>(base));
    const __m512i most = _mm512_set1_epi16(static_cast<int16_t>(span));
    __m512i total = _mm512_setzero_si512();
    for (int64_t first = 0; first < blocks; first += 32) {
      const int64_t stop = min_of(blocks, first + 32);
      __m512i part = _mm512_setzero_si512();
      for (int64_t block = first; block < stop; ++block) {
        const int64_t i = block * kBlock;
        const __m512i x = keys_of<D>(w + i, norm + i);
        const __m512i y = keys_of<D>(w + i + 32, norm + i + 32);
        _mm512_store_si512(keys + i, x);
        _mm512_store_si512(keys + i + 32, y);
        part = _mm512_add_epi16(part, _mm512_min_epu16(_mm512_subs_epu16(x, low), most));
        part = _mm512_add_epi16(part, _mm512_min_epu16(_mm512_subs_epu16(y, low), most));
      }
      total = _mm512_add_epi32(total, _mm512_srli_epi32(part, 16));
      total = _mm512_add_epi32(total, _mm512_and_si512(part, _mm512_set1_epi32(0xffff)));
    }
    return _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_srli_epi64(total, 32),
                                                    _mm512_and_si512(total, _mm512_set1_epi64(0xffffffffu))));
  }

  // The block's share, a half, of the next row.
  template <Dtype D>
  static void prefetch(const char* half_row, int64_t block) {
    constexpr int64_t kBytes = kBlock / 2 * static_cast<int64_t>(sizeof(typename Element<D>::Bits));
    for (int64_t i = 0; i < kBytes; i += 64) _mm_prefetch(half_row + block * kBytes + i, _MM_HINT_T1);
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

  static void count_far(const uint16_t* keys, int64_t blocks, const int32_t* limits, int64_t* counts) {
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
  static void count_near(const uint16_t* keys, int64_t blocks, const int32_t* limits, int64_t* counts,
                         const char* next) {
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

  template <Dtype D>
  static int32_t column_of(int32_t place) {
    return column_at<kLanes<D>>(place);
  }

  template <Dtype D, bool kMask, bool kSums>
  static int64_t write(typename Element<D>::Bits* w, bool* mask, const uint16_t* keys, const float* norm,
                       int64_t blocks, int below, int last, int32_t* places, int32_t first_place, Sums& sums,
                       const char* next) {
    const __m512i below16 = _mm512_set1_epi16(static_cast<int16_t>(below));
    const __m512i last16 = _mm512_set1_epi16(static_cast<int16_t>(last));
    const __m512i below32 = _mm512_set1_epi32(below * 65536 + 65535);
    __m512 all = _mm512_setzero_ps(), pruned = all;
    int64_t listed = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      prefetch<D>(next, block);
      uint64_t inside = 0;
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t i = block * kBlock + half * 32;
        const __m512i x = _mm512_load_si512(keys + i);
        const __mmask32 above = _mm512_cmpgt_epi16_mask(x, below16);
        inside |= static_cast<uint64_t>(_mm512_mask_cmple_epi16_mask(above, x, last16)) << (32 * half);
        __mmask16 keep_a = 0, keep_b = 0;
        if constexpr (D != Dtype::kBFloat16 || kSums) {
          keep_a = _mm512_cmpgt_epi32_mask(_mm512_slli_epi32(x, 16), below32);
          keep_b = _mm512_cmpgt_epi32_mask(x, below32);
        }
        if constexpr (kSums) {
          const Pair s = scores<D>(w + i, norm + i);
          all = _mm512_fmadd_ps(s.a, s.a, _mm512_fmadd_ps(s.b, s.b, all));
          pruned = _mm512_mask3_fmadd_ps(s.a, s.a, pruned, static_cast<__mmask16>(~keep_a));
          pruned = _mm512_mask3_fmadd_ps(s.b, s.b, pruned, static_cast<__mmask16>(~keep_b));
        }
        if constexpr (!kMask && D == Dtype::kFloat32) {
          _mm512_storeu_si512(w + i, _mm512_maskz_loadu_epi32(keep_a, w + i));
          _mm512_storeu_si512(w + i + 16, _mm512_maskz_loadu_epi32(keep_b, w + i + 16));
        } else {
          __mmask32 keep = above;
          if constexpr (D != Dtype::kBFloat16) keep = _mm512_kunpackw(keep_b, keep_a);
          if constexpr (kMask) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(mask + i),
                                _mm256_maskz_set1_epi8(static_cast<__mmask32>(~keep), 1));
          } else {
            _mm512_storeu_si512(w + i, _mm512_maskz_loadu_epi16(keep, w + i));
          }
        }
      }
      listed = append_places<kLanes<D>>(inside, first_place + static_cast<int32_t>(block * kBlock), places,
                                        listed);
      if constexpr (kSums) {
        if (block % 64 == 63 || block + 1 == blocks) {
          sums.all += _mm512_reduce_add_ps(all);
          sums.pruned += _mm512_reduce_add_ps(pruned);
          all = pruned = _mm512_setzero_ps();
        }
      }
    }
    return listed;
  }
};

}  // namespace

void rows_avx512(const RowsParams& params, int64_t begin, int64_t end) {
  run_rows<Avx512>(params, begin, end);
}

}  // namespace wanda::cpu

#include "target_end.h"

#else

namespace wanda::cpu {

void rows_avx512(const RowsParams& params, int64_t begin, int64_t end) { rows_scalar(params, begin, end); }

}  // namespace wanda::cpu

#endif

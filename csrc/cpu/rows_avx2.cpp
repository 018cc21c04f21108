// Row selection for AVX2 (with F16C); the driver is in rows_impl.h.
#include "rows.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <new>

#include "target_avx2_begin.h"

#include "rows_impl.h"

namespace wanda::cpu {
namespace {

// Two vectors of 8 float32 make one vector of 16 keys, as in rows_avx512.cpp.
struct Pair {
  __m256 a, b;
};

inline __m256i load256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline void store256(void* to, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }

struct Avx2 {
  typedef int32_t Lanes __attribute__((vector_size(32)));

  template <Dtype D>
  static constexpr int kLanes = D == Dtype::kBFloat16 ? 0 : 8;

  template <Dtype D>
  static Pair load(const typename Element<D>::Bits* w) {
    if constexpr (D == Dtype::kFloat32) {
      return {_mm256_castsi256_ps(load256(w)), _mm256_castsi256_ps(load256(w + 8))};
    } else if constexpr (D == Dtype::kBFloat16) {
      const __m256i raw = load256(w);
      return {_mm256_castsi256_ps(_mm256_slli_epi32(raw, 16)),
              _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(-65536)))};
    } else {
      return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))),
              _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 8)))};
    }
  }

  template <Dtype D>
  static Pair scores(const typename Element<D>::Bits* w, const float* norm) {
    const Pair x = load<D>(w);
    return {_mm256_mul_ps(x.a, _mm256_load_ps(norm)), _mm256_mul_ps(x.b, _mm256_load_ps(norm + 8))};
  }

  template <Dtype D>
  static void arrange_norm(const float* norm, float* out, int64_t blocks) {
    if constexpr (D == Dtype::kBFloat16) {
      for (int64_t i = 0; i < blocks * kBlock; i += 16) {
        for (int64_t j = 0; j < 8; ++j) {
          out[i + j] = norm[i + 2 * j];
          out[i + 8 + j] = norm[i + 2 * j + 1];
        }
      }
    } else {
      std::memcpy(out, norm, static_cast<size_t>(blocks * kBlock) * sizeof(float));
    }
  }

  template <Dtype D>
  static __m256i keys_of(const typename Element<D>::Bits* w, const float* norm) {
    const Pair s = scores<D>(w, norm);
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(s.a), 16);
    return _mm256_and_si256(_mm256_blend_epi16(low, _mm256_castps_si256(s.b), 0xaa),
                            _mm256_set1_epi16(0x7fff));
  }

  static __m256i fold(__m256i x) {
    return _mm256_add_epi32(_mm256_srli_epi32(x, 16), _mm256_and_si256(x, _mm256_set1_epi32(0xffff)));
  }

  static int64_t sum_epi32(__m256i x) {
    alignas(32) int32_t lanes[8];
    store256(lanes, x);
    int64_t sum = 0;
    for (const int32_t lane : lanes) sum += lane;
    return sum;
  }

  static double sum_ps(__m256 x) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, x);
    double sum = 0;
    for (const float lane : lanes) sum += lane;
    return sum;
  }

  // The block's share, a half, of the next row.
  template <Dtype D>
  static void prefetch(const char* half_row, int64_t block) {
    constexpr int64_t kBytes = kBlock / 2 * static_cast<int64_t>(sizeof(typename Element<D>::Bits));
    for (int64_t i = 0; i < kBytes; i += 64) _mm_prefetch(half_row + block * kBytes + i, _MM_HINT_T1);
  }

  template <Dtype D>
  static int64_t make_keys(const typename Element<D>::Bits* w, const float* norm, uint16_t* keys,
                           int64_t blocks, int base, int span) {
    const __m256i low = _mm256_set1_epi16(static_cast<int16_t>(base));
    const __m256i most = _mm256_set1_epi16(static_cast<int16_t>(span));
    int64_t sum = 0;
    for (int64_t first = 0; first < blocks; first += 16) {
      const int64_t stop = min_of(blocks, first + 16);
      __m256i part = _mm256_setzero_si256();
      for (int64_t block = first; block < stop; ++block) {
        for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i += 16) {
          const __m256i x = keys_of<D>(w + i, norm + i);
          store256(keys + i, x);
          part = _mm256_add_epi16(part, _mm256_min_epu16(_mm256_subs_epu16(x, low), most));
        }
      }
      sum += sum_epi32(fold(part));
    }
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
  static void count_near(const uint16_t* keys, int64_t blocks, const int32_t* limits, int64_t* counts,
                         const char* next) {
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
        const __m256i x = _mm256_sub_epi16(load256(keys + i), origin);
        const __m256i y = _mm256_sub_epi16(load256(keys + i + 16), origin);
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

  static void count_far(const uint16_t* keys, int64_t blocks, const int32_t* limits, int64_t* counts) {
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
        const __m256i x = load256(keys + i);
        c0 = _mm256_sub_epi16(c0, _mm256_cmpgt_epi16(x, last[0]));
        c1 = _mm256_sub_epi16(c1, _mm256_cmpgt_epi16(x, last[1]));
        c2 = _mm256_sub_epi16(c2, _mm256_cmpgt_epi16(x, last[2]));
        c3 = _mm256_sub_epi16(c3, _mm256_cmpgt_epi16(x, last[3]));
        c4 = _mm256_sub_epi16(c4, _mm256_cmpgt_epi16(x, last[4]));
        c5 = _mm256_sub_epi16(c5, _mm256_cmpgt_epi16(x, last[5]));
        c6 = _mm256_sub_epi16(c6, _mm256_cmpgt_epi16(x, last[6]));
        c7 = _mm256_sub_epi16(c7, _mm256_cmpgt_epi16(x, last[7]));
      }
      counts[0] -= sum_epi32(fold(c0));
      counts[1] -= sum_epi32(fold(c1));
      counts[2] -= sum_epi32(fold(c2));
      counts[3] -= sum_epi32(fold(c3));
      counts[4] -= sum_epi32(fold(c4));
      counts[5] -= sum_epi32(fold(c5));
      counts[6] -= sum_epi32(fold(c6));
      counts[7] -= sum_epi32(fold(c7));
    }
  }

  template <Dtype D>
  static int32_t column_of(int32_t place) {
    return column_at<kLanes<D>>(place);
  }

  // 0xffff for each key in (below, last].
  static __m256i in_range(__m256i key, __m256i below, __m256i last) {
    return _mm256_andnot_si256(_mm256_cmpgt_epi16(key, last), _mm256_cmpgt_epi16(key, below));
  }

  template <Dtype D, bool kMask, bool kSums>
  static int64_t write(typename Element<D>::Bits* w, bool* mask, const uint16_t* keys, const float* norm,
                       int64_t blocks, int below, int last, int32_t* places, int32_t first_place, Sums& sums,
                       const char* next) {
    const __m256i below16 = _mm256_set1_epi16(static_cast<int16_t>(below));
    const __m256i last16 = _mm256_set1_epi16(static_cast<int16_t>(last));
    const __m256i below32 = _mm256_set1_epi32(below * 65536 + 65535);
    __m256 all = _mm256_setzero_ps(), pruned = all;
    int64_t listed = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      uint64_t inside = 0;
      prefetch<D>(next, block);
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t i = block * kBlock + half * 32;
        const __m256i x = load256(keys + i), y = load256(keys + i + 16);
        const __m256i hits = _mm256_permute4x64_epi64(
            _mm256_packs_epi16(in_range(x, below16, last16), in_range(y, below16, last16)), 0xd8);
        inside |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(hits))) << (32 * half);
        write_16<D, kMask, kSums>(w + i, mask + i, norm + i, x, below16, below32, all, pruned);
        write_16<D, kMask, kSums>(w + i + 16, mask + i + 16, norm + i + 16, y, below16, below32, all, pruned);
      }
      listed = append_places<kLanes<D>>(inside, first_place + static_cast<int32_t>(block * kBlock), places,
                                        listed);
      if constexpr (kSums) {
        if (block % 64 == 63 || block + 1 == blocks) {
          sums.all += sum_ps(all);
          sums.pruned += sum_ps(pruned);
          all = pruned = _mm256_setzero_ps();
        }
      }
    }
    return listed;
  }

  template <Dtype D, bool kMask, bool kSums>
  static void write_16(typename Element<D>::Bits* w, bool* mask, const float* norm, __m256i key,
                       __m256i below16, __m256i below32, __m256& all, __m256& pruned) {
    __m256i keep = _mm256_cmpgt_epi16(key, below16), keep_a = keep, keep_b = keep;
    if constexpr (D != Dtype::kBFloat16 || kSums) {
      keep_a = _mm256_cmpgt_epi32(_mm256_slli_epi32(key, 16), below32);
      keep_b = _mm256_cmpgt_epi32(key, below32);
    }
    if constexpr (kSums) {
      const Pair s = scores<D>(w, norm);
      const __m256 a = _mm256_mul_ps(s.a, s.a), b = _mm256_mul_ps(s.b, s.b);
      all = _mm256_add_ps(all, _mm256_add_ps(a, b));
      pruned = _mm256_add_ps(pruned, _mm256_andnot_ps(_mm256_castsi256_ps(keep_a), a));
      pruned = _mm256_add_ps(pruned, _mm256_andnot_ps(_mm256_castsi256_ps(keep_b), b));
    }
    if constexpr (!kMask && D == Dtype::kFloat32) {
      store256(w, _mm256_and_si256(load256(w), keep_a));
      store256(w + 8, _mm256_and_si256(load256(w + 8), keep_b));
      return;
    }
    if constexpr (D != Dtype::kBFloat16) {
      keep = _mm256_permute4x64_epi64(_mm256_packs_epi32(keep_a, keep_b), 0xd8);
    }
    if constexpr (kMask) {
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(keep), _mm256_extracti128_si256(keep, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(mask), _mm_add_epi8(bytes, _mm_set1_epi8(1)));
    } else {
      store256(w, _mm256_and_si256(load256(w), keep));
    }
  }
};

}  // namespace

void rows_avx2(const RowsParams& params, int64_t begin, int64_t end) { run_rows<Avx2>(params, begin, end); }

}  // namespace wanda::cpu

#include "target_end.h"

#else

namespace wanda::cpu {

void rows_avx2(const RowsParams& params, int64_t begin, int64_t end) { rows_scalar(params, begin, end); }

}  // namespace wanda::cpu

#endif

// The AVX2 steps of nm_impl.h. Included after target_avx2_begin.h, with <immintrin.h> before it.
#pragma once

#include "nm_impl.h"

namespace wanda::cpu {
namespace {

struct NmLanesAvx2 {
  static constexpr bool kFast = true;
  static constexpr int kBytes = 32;
  template <Dtype dtype, int m>
  using Select = NmSelect<NmLanesAvx2, dtype, m>;
  static constexpr int64_t kUnit = 16;  // columns per compare()

  template <Dtype dtype, class T>
  static __m256i keys(const T* w, const float* norm) {
    __m256 value;
    if constexpr (dtype == Dtype::kFloat32) {
      value = _mm256_loadu_ps(reinterpret_cast<const float*>(w));
    } else {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
      if constexpr (dtype == Dtype::kBFloat16) {
        value = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
      } else {
        value = _mm256_cvtph_ps(half);
      }
    }
    const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(value, _mm256_loadu_ps(norm)));
    return _mm256_min_epu32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)),
                            _mm256_set1_epi32(0x7f800001));
  }

  // Rotations inside 128-bit lanes: lane i receives lane i + r mod 4.
  static __m256i rotate_1(__m256i v) { return _mm256_shuffle_epi32(v, 0x39); }
  static __m256i rotate_2(__m256i v) { return _mm256_shuffle_epi32(v, 0x4e); }
  static __m256i rotate_3(__m256i v) { return _mm256_shuffle_epi32(v, 0x93); }

  static void store_less_equal(uint64_t* words, int64_t at, __m256i a, __m256i b) {
    const int greater = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)));
    reinterpret_cast<unsigned char*>(words)[at] = static_cast<unsigned char>(~greater);
  }

  // Lane i <= lane i + 1, with a bias that makes lane 3 < lane 0.
  static void store_next(uint64_t* words, int64_t at, __m256i key) {
    const __m256i bias = _mm256_setr_epi32(0, 0, 0, 1, 0, 0, 0, 1);
    store_less_equal(words, at, _mm256_add_epi32(key, bias), rotate_1(key));
  }

  template <Dtype dtype, class T>
  static void compare(const T* w, const float* norm, int64_t unit, NmComparisons4& out) {
    for (int64_t half = 0; half < 2; ++half) {
      const __m256i key = keys<dtype>(w + 8 * half, norm + 8 * half);
      store_next(out.next, 2 * unit + half, key);
      store_less_equal(out.across, 2 * unit + half, key, rotate_2(key));
    }
  }

  template <Dtype dtype, class T>
  static void compare(const T* w, const float* norm, int64_t unit, NmComparisons8& out) {
    const __m256i first = keys<dtype>(w, norm);
    const __m256i second = keys<dtype>(w + 8, norm + 8);
    const __m256i x = _mm256_permute2x128_si256(first, second, 0x20);
    const __m256i y = _mm256_permute2x128_si256(first, second, 0x31);
    const __m256i y2 = rotate_2(y);
    store_next(out.next_x, unit, x);
    store_next(out.next_y, unit, y);
    store_less_equal(out.across_x, unit, x, rotate_2(x));
    store_less_equal(out.across_y, unit, y, y2);
    store_less_equal(out.against[0], unit, x, y);
    store_less_equal(out.against[1], unit, x, rotate_1(y));
    store_less_equal(out.against[2], unit, x, y2);
    store_less_equal(out.against[3], unit, x, rotate_3(y));
  }

  static void zero_pruned(uint32_t* w, int64_t count, const NmBits& bits) {
    const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    int64_t j = 0;
    for (; j + 8 <= count; j += 8) {
      const __m256i pruned = _mm256_set1_epi32(static_cast<int>(bits.word[j / 64] >> (j % 64)));
      const __m256i keep = _mm256_cmpeq_epi32(_mm256_and_si256(pruned, lane_bits), _mm256_setzero_si256());
      auto* at = reinterpret_cast<__m256i*>(w + j);
      _mm256_storeu_si256(at, _mm256_and_si256(_mm256_loadu_si256(at), keep));
    }
    for (; j < count; ++j) w[j] = bits.test(j) ? 0 : w[j];
  }

  static void zero_pruned(uint16_t* w, int64_t count, const NmBits& bits) {
    const __m256i lane_bits = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192,
                                                16384, static_cast<int16_t>(0x8000));
    int64_t j = 0;
    for (; j + 16 <= count; j += 16) {
      auto* at = reinterpret_cast<__m256i*>(w + j);
      const __m256i pruned = _mm256_set1_epi16(static_cast<int16_t>(bits.word[j / 64] >> (j % 64)));
      const __m256i keep = _mm256_cmpeq_epi16(_mm256_and_si256(pruned, lane_bits), _mm256_setzero_si256());
      _mm256_storeu_si256(at, _mm256_and_si256(_mm256_loadu_si256(at), keep));
    }
    for (; j < count; ++j) w[j] = bits.test(j) ? uint16_t{0} : w[j];
  }

  static void write_mask(bool* mask, int64_t count, const NmBits& bits) {
    int64_t j = 0;
    for (; j + 8 <= count; j += 8) {
      const uint64_t pruned = bits.word[j / 64] >> (j % 64) & 0xff;
      const uint64_t bytes = _pdep_u64(pruned, 0x0101010101010101u);
      std::memcpy(mask + j, &bytes, sizeof(bytes));
    }
    for (; j < count; ++j) mask[j] = bits.test(j);
  }
};

}  // namespace
}  // namespace wanda::cpu

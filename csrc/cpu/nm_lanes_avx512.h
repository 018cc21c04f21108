// The AVX-512 steps of nm_impl.h. Included after target_avx512_begin.h, with <immintrin.h> before it.
#pragma once

#include "nm_impl.h"

namespace wanda::cpu {
namespace {

template <int n>
class NmSelectPairs4;
class NmSelectPairs8;

struct NmLanesAvx512 {
  static constexpr bool kFast = true;
  static constexpr int kBytes = 64;
  template <Dtype dtype, int m>
  using Select = NmSelect<NmLanesAvx512, dtype, m>;
  static constexpr int64_t kUnit = 32;  // columns per compare()

  template <Dtype dtype, class T>
  static __m512i keys(const T* w, const float* norm) {
    __m512 value;
    if constexpr (dtype == Dtype::kFloat32) {
      value = _mm512_loadu_ps(w);
    } else {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
      if constexpr (dtype == Dtype::kBFloat16) {
        value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      } else {
        value = _mm512_cvtph_ps(half);
      }
    }
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(value, _mm512_loadu_ps(norm)));
    return _mm512_min_epu32(_mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)),
                            _mm512_set1_epi32(0x7f800001));
  }

  // Rotations inside 128-bit lanes: lane i receives lane i + r mod 4.
  static __m512i rotate_1(__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_ADCB); }
  static __m512i rotate_2(__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_BADC); }
  static __m512i rotate_3(__m512i v) { return _mm512_shuffle_epi32(v, _MM_PERM_CBAD); }

  static void store(uint64_t* words, int64_t at, __mmask16 mask) {
    const uint16_t bits = mask;
    std::memcpy(reinterpret_cast<char*>(words) + 2 * at, &bits, sizeof(bits));
  }

  // Lane i <= lane i + 1, with a bias that makes lane 3 < lane 0.
  static __mmask16 next(__m512i key) {
    const __m512i bias = _mm512_maskz_set1_epi32(0x8888, 1);
    return _mm512_cmple_epi32_mask(_mm512_add_epi32(key, bias), rotate_1(key));
  }

  template <Dtype dtype, class T>
  static void compare(const T* w, const float* norm, int64_t unit, NmComparisons4& out) {
    for (int64_t half = 0; half < 2; ++half) {
      const __m512i key = keys<dtype>(w + 16 * half, norm + 16 * half);
      store(out.next, 2 * unit + half, next(key));
      store(out.across, 2 * unit + half, _mm512_cmple_epi32_mask(key, rotate_2(key)));
    }
  }

  template <Dtype dtype, class T>
  static void compare(const T* w, const float* norm, int64_t unit, NmComparisons8& out) {
    const __m512i first = keys<dtype>(w, norm);
    const __m512i second = keys<dtype>(w + 16, norm + 16);
    const __m512i x = _mm512_shuffle_i32x4(first, second, 0x88);
    const __m512i y = _mm512_shuffle_i32x4(first, second, 0xdd);
    const __m512i y2 = rotate_2(y);
    store(out.next_x, unit, next(x));
    store(out.next_y, unit, next(y));
    store(out.across_x, unit, _mm512_cmple_epi32_mask(x, rotate_2(x)));
    store(out.across_y, unit, _mm512_cmple_epi32_mask(y, y2));
    store(out.against[0], unit, _mm512_cmple_epi32_mask(x, y));
    store(out.against[1], unit, _mm512_cmple_epi32_mask(x, rotate_1(y)));
    store(out.against[2], unit, _mm512_cmple_epi32_mask(x, y2));
    store(out.against[3], unit, _mm512_cmple_epi32_mask(x, rotate_3(y)));
  }

  static void zero_pruned(float* w, int64_t count, const NmBits& bits) {
    for (int64_t j = 0; j < count; j += 16) {
      const uint32_t valid = count - j >= 16 ? 0xffffu : (1u << (count - j)) - 1;
      const uint32_t pruned = static_cast<uint32_t>(bits.word[j / 64] >> (j % 64)) & valid;
      _mm512_mask_storeu_ps(w + j, static_cast<__mmask16>(pruned), _mm512_setzero_ps());
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

}  // namespace
}  // namespace wanda::cpu

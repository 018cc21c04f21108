// Packed weights with values of 8 or 4 bits with AVX-512.
//
// Stored bytes are unsigned, with an offset: VPEXPANDB spreads 64 columns of a row over a register full of
// the offset, and VPDPBUSD adds up their products with signed bytes of x, four columns in a lane. So a sum is
// too large by offset * the sum of x's lane, which is the same for all rows: sums start at its negative. Of 4
// bits a row of high halves uses byte & 0xf0: all of its sums are 16 times as large, and its factors 16 times
// smaller. 2:4: indices become masks, a group of rows at a time, then as bitmaps; 32 bytes are 64 columns.
//
// A file of its own: it needs VBMI2 and VNNI beside what Isa::kAvx512 means.
#if defined(__x86_64__)

#if !defined(__clang__)  // as isa_avx512.cpp
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "convert.h"
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                       \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq," \
                          "avx512vl,avx512vbmi2,avx512vnni"))),                                     \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#pragma GCC target("avx512vbmi2,avx512vnni")
#endif

#include "expand_avx512.h"
#include "quantized_impl.h"

namespace wanda::cpu {
namespace {

enum class Form : int { kBitmap, kSparse24, kDense };

inline Form form_of(const QuantizedWeight& w) {
  return w.codes == nullptr ? Form::kDense : w.starts != nullptr ? Form::kBitmap : Form::kSparse24;
}

// f(bits, form), both as constants.
template <class F>
void by_form(const QuantizedWeight& w, F f) {
  const auto with = [&](auto bits) {
    switch (form_of(w)) {
      case Form::kBitmap:
        return f(bits, std::integral_constant<Form, Form::kBitmap>{});
      case Form::kSparse24:
        return f(bits, std::integral_constant<Form, Form::kSparse24>{});
      case Form::kDense:
        return f(bits, std::integral_constant<Form, Form::kDense>{});
    }
  };
  if (w.bits == 8) return with(std::integral_constant<int, 8>{});
  with(std::integral_constant<int, 4>{});
}

// VPDPBUSD. Around the intrinsic GCC 12 copies every sum to another register and back.
WANDA_STEP inline void add_products(__m512i& sum, __m512i weight, __m512i columns) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weight), "v"(columns));
}

// ---- x.

template <Dtype dtype>
inline __m512 floats_of(const typename Element<dtype>::Bits* x) {
  if constexpr (dtype == Dtype::kFloat32) {
    return _mm512_loadu_ps(x);
  } else {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    if constexpr (dtype == Dtype::kFloat16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
}

// As scale_of.
template <Dtype dtype>
inline float scale_of_512(const typename Element<dtype>::Bits* x, int64_t count, float most) {
  __m512i largest = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t j = 0; j < count; j += 32) {
    for (int64_t i = 0; i < 32; i += 16) {
      const __m512i bits = _mm512_castps_si512(floats_of<dtype>(x + j + i));
      largest = _mm512_max_epi32(largest, _mm512_and_si512(bits, magnitude));
    }
  }
  return float_of_bits(static_cast<uint32_t>(_mm512_reduce_max_epi32(largest))) / most;
}

inline __m512i four_of(const __m128i (&parts)[4]) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(parts[0]), parts[1], 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(parts[2]), parts[3], 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// As round_token, upper and lower bytes of 16 bits apart.
template <Dtype dtype>
void round_token_512(const QuantizedWeight& w, const typename Element<dtype>::Bits* x, int64_t t,
                     const QuantizedColumns& out) {
  const int64_t planes = planes_of(w), together = blocks_of_part(w);
  const float most = w.bits == 8 ? kMostOfX8 : kMostOfX4;
  float* scales = out.scales + t * w.groups;
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t begin = group * w.group, left = w.cols - begin;
    scales[group] = scale_of_512<dtype>(x + begin, left < w.group ? left : w.group, most);
  }
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(offset_of(w))), zero = _mm512_setzero_si512();
  const __m512i half = _mm512_set1_epi32(128);
  __m512i upper_start = zero, lower_start = zero;
  for (int64_t block = 0; block < w.cols / kQuantizedBlock; ++block) {
    __m128i upper[4], lower[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t column = block * kQuantizedBlock + 16 * i;
      const float scale = scales[column / w.group];
      const __mmask16 usable = is_usable(scale) ? 0xffff : 0;
      const __m512 exact = _mm512_maskz_div_ps(usable, floats_of<dtype>(x + column), _mm512_set1_ps(scale));
      const __m512i whole = _mm512_cvt_roundps_epi32(exact, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      lower[i] = _mm512_cvtepi32_epi8(whole);
      upper[i] = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(whole, half), 8));
    }
    int8_t* to = out.whole + (block * out.slab + t) * planes * kQuantizedBlock;
    if (block % together == 0) upper_start = lower_start = zero;
    int32_t* starts = out.starts + (block / together * out.slab + t) * planes * kQuantizedLanes;
    if (w.bits == 8) {
      const __m512i columns = four_of(upper);
      _mm512_store_si512(to, columns);
      add_products(upper_start, offset, columns);
      _mm512_store_si512(starts, _mm512_sub_epi32(zero, upper_start));
      to += kQuantizedBlock;
      starts += kQuantizedLanes;
    }
    const __m512i columns = four_of(lower);
    _mm512_store_si512(to, columns);
    add_products(lower_start, offset, columns);
    _mm512_store_si512(starts, _mm512_sub_epi32(zero, lower_start));
  }
}

void round(const QuantizedWeight& w, const void* x, Dtype type, int64_t tokens,
           const QuantizedColumns& columns, int64_t begin, int64_t end) {
  by_dtype(type, [&](auto constant) {
    constexpr Dtype dtype = decltype(constant)::value;
    round_slabs<dtype>(w, x, tokens, columns, begin, end, &round_token_512<dtype>);
  });
}

// ---- The weight.

// Sixteen lanes added up by halves.
inline float tree_of(__m512 lanes) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// 256 * upper + lower, rounded once: in groups it fits int32, of whole rows it need not.
template <bool fits>
inline __m512 joined(__m512i upper, __m512i lower) {
  if constexpr (fits) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower));
  } else {
    const __m512d weight = _mm512_set1_pd(256.0);
    const __m256 first =
        _mm512_cvtpd_ps(_mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(upper)), weight,
                                        _mm512_cvtepi32_pd(_mm512_castsi512_si256(lower))));
    const __m256 second =
        _mm512_cvtpd_ps(_mm512_fmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(upper, 1)), weight,
                                        _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(lower, 1))));
    return _mm512_insertf32x8(_mm512_castps256_ps512(first), second, 1);
  }
}

// To L2, as packed_avx512.cpp.
WANDA_STEP inline void prefetch(const void* from, int64_t ahead) {
  prefetch_l2(static_cast<const char*>(from) + ahead);
}

// The stored values of the next 64 columns of a row in their places. 4 bits: `is_high` those of high halves.
template <int bits, Form form>
WANDA_STEP inline __m512i take(const uint8_t* masks, bool is_high, const uint8_t*& next) {
  __m512i stored;
  if constexpr (form == Form::kSparse24) {
    stored = loaded_half(next);
  } else {
    stored = loaded(next);
  }
  if constexpr (bits == 4) {
    stored = _mm512_and_si512(stored, _mm512_set1_epi8(static_cast<char>(is_high ? 0xf0 : 0x0f)));
  }
  if constexpr (form == Form::kDense) {
    next += kQuantizedBlock;
    return stored;
  } else {
    uint64_t mask;
    std::memcpy(&mask, masks, sizeof(mask));
    asm("" : "+r"(mask));  // or it goes through memory to a mask register
    next += form == Form::kSparse24 ? kQuantizedBlock / 2 : __builtin_popcountll(mask);
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(bits == 8 || is_high ? 128 : 8));
    return _mm512_mask_expand_epi8(offset, mask, stored);
  }
}

#define WANDA_UNROLL _Pragma("GCC unroll 8")

constexpr int64_t kLine = 8;      // blocks of a cache line of codes
constexpr int64_t kFactors = 16;  // groups whose factors are made at once

// The factors of up to 16 groups of rows that follow each other, for one slab. `last`: rows past it as it.
template <int bits, int rows, int slab>
WANDA_STEP inline void factors_of(const QuantizedWeight& w, const float* x_scales, int64_t row, int64_t last,
                                  int64_t group, float (&factors)[rows][slab][kFactors]) {
  const int64_t left = w.groups - group;
  const auto there = static_cast<__mmask16>(left < kFactors ? (1 << left) - 1 : 0xffff);
  WANDA_UNROLL for (int r = 0; r < rows; ++r) {
    const int64_t at = row + r < last ? row + r : last;
    const uint16_t* from = w.scales + at * w.groups + group;
    prefetch(from, rows * w.groups * int64_t{sizeof(uint16_t)});
    const __m512 scales = _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16));
    WANDA_UNROLL for (int t = 0; t < slab; ++t) {
      __m512 made = _mm512_mul_ps(scales, _mm512_maskz_loadu_ps(there, x_scales + t * w.groups + group));
      if (bits == 4 && r % 2 == 1) made = _mm512_mul_ps(made, _mm512_set1_ps(0.0625f));
      _mm512_store_ps(factors[r][t], made);
    }
  }
}

// Products of `valid` rows from `row` on with one slab, row t of x into sums[r * batch + t]. Rows past the
// last one are computed as it and left away. `group`: columns of a scale, 0: a row's. `masks`: [rows, cols /
// 8].
template <int bits, Form form, int group, int rows, int slab>
void product_group(const QuantizedWeight& w, const QuantizedColumns& x, int64_t row, int64_t valid,
                   const uint8_t* masks, int64_t batch, float* sums) {
  constexpr int planes = bits == 8 ? 2 : 1, halves = bits == 8 ? 1 : 2;
  constexpr int64_t kGroupsOfPart = group == 32 ? 2 : 1;
  const int64_t bytes = w.cols / 8, codes_ahead = rows * bytes, last_row = row + valid - 1;
  const uint8_t* next[rows];
  __m512 lanes[rows][slab];
  WANDA_UNROLL for (int r = 0; r < rows; ++r) {
    next[r] = quantized_values(w, row + r < last_row ? row + r : last_row);
    WANDA_UNROLL for (int t = 0; t < slab; ++t) lanes[r][t] = _mm512_setzero_ps();
  }
  const int64_t values_ahead = form == Form::kBitmap
                                   ? quantized_values(w, row + valid) - next[0]
                                   : rows / halves * (form == Form::kDense ? w.cols : w.cols / 2);
  const int8_t* whole = x.whole;
  const int32_t* starts = x.starts;
  int64_t left = w.cols / kQuantizedBlock;  // blocks
  __m512i sum[rows][slab][planes];
  const auto block = [&]() __attribute__((always_inline)) {
    if (form == Form::kBitmap && left % kLine == 0) {
      WANDA_UNROLL for (int r = 0; r < rows; ++r) prefetch(masks + r * bytes, codes_ahead);
    }
    __m512i columns[slab][planes];
    WANDA_UNROLL for (int t = 0; t < slab; ++t) {
      WANDA_UNROLL for (int p = 0; p < planes; ++p) {
        columns[t][p] = _mm512_load_si512(whole + (t * planes + p) * kQuantizedBlock);
      }
    }
    WANDA_UNROLL for (int r = 0; r < rows; ++r) {
      const bool is_high = bits == 4 && r % 2 == 1;
      if (!is_high) prefetch(next[r], values_ahead);
      const __m512i weight = take<bits, form>(masks + r * bytes, is_high, next[r]);
      WANDA_UNROLL for (int t = 0; t < slab; ++t) {
        WANDA_UNROLL for (int p = 0; p < planes; ++p) add_products(sum[r][t][p], weight, columns[t][p]);
      }
    }
    whole += slab * planes * kQuantizedBlock;
    masks += 8;
    --left;
  };
  alignas(64) float factors[rows][slab][kFactors];
  for (int64_t first = 0; left > 0; first += kFactors) {
    factors_of<bits>(w, x.scales, row, last_row, first, factors);
    for (int64_t g = 0; g < kFactors && left > 0; g += kGroupsOfPart) {
      WANDA_UNROLL for (int t = 0; t < slab; ++t) {
        WANDA_UNROLL for (int p = 0; p < planes; ++p) {
          const __m512i start = _mm512_load_si512(starts + (t * planes + p) * kQuantizedLanes);
          WANDA_UNROLL for (int r = 0; r < rows; ++r) {
            sum[r][t][p] = bits == 4 && r % 2 == 1 ? _mm512_slli_epi32(start, 4) : start;
          }
        }
      }
      starts += slab * planes * kQuantizedLanes;
      do {
        block();
      } while (group == 0 && left > 0);
      if (group == 128 && left > 0) block();
      WANDA_UNROLL for (int r = 0; r < rows; ++r) {
        WANDA_UNROLL for (int t = 0; t < slab; ++t) {
          const float* factor = factors[r][t] + g;
          const __m512 added = bits == 8 ? joined<group != 0>(sum[r][t][0], sum[r][t][planes - 1])
                                         : _mm512_cvtepi32_ps(sum[r][t][0]);
          __m512 by = _mm512_set1_ps(factor[0]);
          if (group == 32) by = _mm512_insertf32x8(by, _mm256_set1_ps(factor[1]), 1);
          lanes[r][t] = _mm512_add_ps(lanes[r][t], _mm512_mul_ps(added, by));
        }
      }
    }
  }
  WANDA_UNROLL for (int r = 0; r < rows; ++r) {
    if (r >= valid) break;
    WANDA_UNROLL for (int t = 0; t < slab; ++t) sums[r * batch + t] = tree_of(lanes[r][t]);
  }
}

// Rows at once: as many as leave the sums in registers.
constexpr int rows_at_once(int slab) { return slab == 1 ? 8 : slab == 2 ? 4 : 2; }

template <int bits, Form form, int group, int slab>
void product_rows(const QuantizedWeight& w, const QuantizedColumns& x, float* sums, int64_t begin,
                  int64_t end, void* scratch) {
  constexpr int rows = rows_at_once(slab);
  auto* const copied = static_cast<uint8_t*>(scratch);
  const int64_t bytes = w.cols / 8;
  for (int64_t row = begin; row < end; row += rows) {
    const int64_t valid = end - row < rows ? end - row : rows;
    const uint8_t* masks = form == Form::kBitmap && valid == rows ? w.codes + row * bytes : copied;
    if (form != Form::kDense && masks == copied) {
      for (int r = 0; r < rows; ++r) {
        const uint8_t* codes = w.codes + (r < valid ? row + r : end - 1) * bytes;
        if (form == Form::kSparse24) {
          decode_24(codes, bytes, copied + r * bytes);
        } else {
          std::memcpy(copied + r * bytes, codes, static_cast<size_t>(bytes));
        }
      }
    }
    for (int64_t first = 0; first < x.batch; first += slab) {
      product_group<bits, form, group, rows, slab>(w, slab_of(w, x, first), row, valid, masks, x.batch,
                                                   sums + row * x.batch + first);
    }
  }
}

template <int bits, Form form, int group>
void product_slabs(const QuantizedWeight& w, const QuantizedColumns& x, float* sums, int64_t begin,
                   int64_t end, void* scratch) {
  const auto kernel = x.slab == 1   ? &product_rows<bits, form, group, 1>
                      : x.slab == 2 ? &product_rows<bits, form, group, 2>
                                    : &product_rows<bits, form, group, 4>;
  kernel(w, x, sums, begin, end, scratch);
}

template <int bits, Form form>
void product_groups(const QuantizedWeight& w, const QuantizedColumns& x, float* sums, int64_t begin,
                    int64_t end, void* scratch) {
  const auto kernel = w.groups == 1   ? &product_slabs<bits, form, 0>
                      : w.group == 32 ? &product_slabs<bits, form, 32>
                      : w.group == 64 ? &product_slabs<bits, form, 64>
                                      : &product_slabs<bits, form, 128>;
  kernel(w, x, sums, begin, end, scratch);
}

void product(const QuantizedWeight& w, const QuantizedColumns& x, float* sums, int64_t begin, int64_t end,
             void* scratch) {
  const HonourDenormals honour;
  by_form(w, [&](auto bits, auto form) {
    product_groups<decltype(bits)::value, decltype(form)::value>(w, x, sums, begin, end, scratch);
  });
}

}  // namespace
}  // namespace wanda::cpu

#include "quantized_unpack_avx512.h"

namespace wanda::cpu {

void add_quantized_avx512(Kernels& kernels) {
  kernels.quantized_round = &round;
  kernels.quantized_product = &product;
  kernels.quantized_unpack = &unpack;
}

}  // namespace wanda::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

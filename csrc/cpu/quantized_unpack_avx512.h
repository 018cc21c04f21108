// Weights of 8 or 4 bits unpacked with AVX-512; included by quantized_avx512.cpp, whose take() it uses.
// To bfloat16, one thread of a Zen 5, from the cache: 3.3 ns for 64 columns, where each value is rounded by
// plain arithmetic 6.3.
#pragma once

namespace wanda::cpu {
namespace {

// Sixteen elements, each the nearest to a value.
template <Dtype dtype>
WANDA_STEP inline void store_nearest(typename Element<dtype>::Bits* to, __m512 value) {
  if constexpr (dtype == Dtype::kFloat32) {
    _mm512_storeu_ps(to, value);
  } else if constexpr (dtype == Dtype::kFloat16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  } else {  // as bf16_of_float: VCVTNEPS2BF16 takes denormals for 0
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i rounded =
        _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q),
                              _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
  }
}

// 32 columns whose stored values are `stored`, times a scale. Of 4 bits a high half counts 16 times, and its
// scale a sixteenth: both are exact.
template <Dtype dtype>
WANDA_STEP inline void scale_32(__m256i stored, int64_t offset, float scale,
                                typename Element<dtype>::Bits* out) {
  const __m512i subtracted = _mm512_set1_epi32(static_cast<int>(offset));
  WANDA_UNROLL for (int i = 0; i < 2; ++i) {
    const __m128i half = i == 0 ? _mm256_castsi256_si128(stored) : _mm256_extracti128_si256(stored, 1);
    const __m512i whole = _mm512_sub_epi32(_mm512_cvtepu8_epi32(half), subtracted);
    store_nearest<dtype>(out + 16 * i, _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scale)));
  }
}

// The same in bfloat16, for scales of which no product is denormal, and 128 times the scale is finite: value
// * scale - offset * scale is rounded once, for the second product is exact, and VCVTNE2PS2BF16 meets nothing
// that it changes. In assembly, for not every processor of this set has it.
inline bool is_usual(uint16_t scale) { return scale >= 0x0280 && scale < 0x7b80; }
WANDA_STEP inline void scale_32_usual(__m256i stored, int64_t offset, float scale, uint16_t* out) {
  const __m512 factor = _mm512_set1_ps(scale), zero = _mm512_set1_ps(static_cast<float>(offset) * scale);
  const auto of = [&](__m128i half) {
    return _mm512_fmsub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(half)), factor, zero);
  };
  const __m512 low = of(_mm256_castsi256_si128(stored)), high = of(_mm256_extracti128_si256(stored, 1));
  __m512i both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
  _mm512_storeu_si512(out, both);
}

// Rows [begin, end).
template <int bits, Form form, Dtype dtype>
void unpack_rows(const QuantizedWeight& w, typename Element<dtype>::Bits* dense, int64_t begin, int64_t end,
                 uint8_t* scratch) {
  const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
  const int64_t bytes = w.cols / 8;
  const int64_t shift = w.groups == 1 ? 62 : __builtin_ctzll(static_cast<uint64_t>(w.group));
  for (int64_t row = begin; row < end; ++row) {
    const bool is_high = bits == 4 && is_high_half(w, row);
    const uint8_t* masks = form == Form::kBitmap ? w.codes + row * bytes : scratch;
    if (form == Form::kSparse24) decode_24(w.codes + row * bytes, bytes, scratch);
    const uint8_t* next = quantized_values(w, row);
    const int64_t offset = bits == 8 || is_high ? 128 : 8;
    const float part = is_high ? 0.0625f : 1.0f;
    const uint16_t* scales = w.scales + row * w.groups;
    auto* out = dense + row * w.cols;
    for (int64_t col = 0; col < w.cols; col += kQuantizedBlock) {
      const __m512i stored = take<bits, form>(masks + (form == Form::kDense ? 0 : col / 8), is_high, next);
      WANDA_UNROLL for (int i = 0; i < 2; ++i, out += 32) {
        const __m256i half = i == 0 ? _mm512_castsi512_si256(stored) : _mm512_extracti64x4_epi64(stored, 1);
        const uint16_t scale = scales[(col + 32 * i) >> shift];
        if constexpr (dtype == Dtype::kBFloat16) {
          if (has_bf16 && is_usual(scale)) {
            scale_32_usual(half, offset, float_of_bf16(scale) * part, out);
            continue;
          }
        }
        scale_32<dtype>(half, offset, float_of_bf16(scale) * part, out);
      }
    }
  }
}

void unpack(const QuantizedWeight& w, void* dense, Dtype type, int64_t begin, int64_t end, void* scratch) {
  const HonourDenormals honour;
  by_form(w, [&](auto bits, auto form) {
    by_dtype(type, [&](auto constant) {
      constexpr Dtype dtype = decltype(constant)::value;
      auto* out = static_cast<typename Element<dtype>::Bits*>(dense);
      unpack_rows<decltype(bits)::value, decltype(form)::value, dtype>(w, out, begin, end,
                                                                       static_cast<uint8_t*>(scratch));
    });
  });
}

}  // namespace
}  // namespace wanda::cpu

// Weights of 8 or 4 bits unpacked with AVX-512; included by quantized_avx512.cpp, whose take() it uses.
// Before, AVX2's spread a row's bytes in memory first and rounded them by plain code.
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

// Rows [begin, end). Of 4 bits a high half counts 16 times, and its scale a sixteenth: both are exact.
template <int bits, Form form, Dtype dtype>
void unpack_rows(const QuantizedWeight& w, typename Element<dtype>::Bits* dense, int64_t begin, int64_t end,
                 uint8_t* scratch) {
  const int64_t bytes = w.cols / 8;
  const int64_t shift = w.groups == 1 ? 62 : __builtin_ctzll(static_cast<uint64_t>(w.group));
  for (int64_t row = begin; row < end; ++row) {
    const bool is_high = bits == 4 && is_high_half(w, row);
    const uint8_t* masks = form == Form::kBitmap ? w.codes + row * bytes : scratch;
    if (form == Form::kSparse24) decode_24(w.codes + row * bytes, bytes, scratch);
    const uint8_t* next = quantized_values(w, row);
    const __m512i offset = _mm512_set1_epi32(bits == 8 || is_high ? 128 : 8);
    const uint16_t* scales = w.scales + row * w.groups;
    auto* out = dense + row * w.cols;
    for (int64_t col = 0; col < w.cols; col += kQuantizedBlock) {
      alignas(64) uint8_t stored[kQuantizedBlock];
      _mm512_store_si512(stored,
                         take<bits, form>(masks + (form == Form::kDense ? 0 : col / 8), is_high, next));
      WANDA_UNROLL for (int64_t i = 0; i < kQuantizedBlock; i += 16) {
        const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(stored + i));
        const __m512i whole = _mm512_sub_epi32(_mm512_cvtepu8_epi32(part), offset);
        const float scale = float_of_bf16(scales[(col + i) >> shift]) * (is_high ? 0.0625f : 1.0f);
        store_nearest<dtype>(out + col + i, _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scale)));
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

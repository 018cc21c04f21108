// What spreads packed values to their columns with AVX-512 has in common. From registers VPEXPANDB, VPEXPANDW
// and VPEXPANDD are fast on Zen 4 and 5, from memory they are microcode.
#pragma once

namespace wanda::cpu {
namespace {

// 64 bytes, or 32, in a load that the compiler does not join with the expansion.
inline __m512i loaded(const void* from) {
  __m512i value = _mm512_loadu_si512(from);
  asm("" : "+v"(value));
  return value;
}
inline __m512i loaded_half(const void* from) {
  __m512i value = _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  asm("" : "+v"(value));
  return value;
}

// 2:4: the masks of up to 512 columns.
inline __m512i masks_of_24(__m512i codes) {
  // Entry i: the columns of four that index 0 | index 1 << 2 keeps.
  const __m512i low =
      _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
  const __m512i nibble = _mm512_set1_epi8(15), high = _mm512_slli_epi16(low, 4);
  const __m512i first = _mm512_shuffle_epi8(low, _mm512_and_si512(codes, nibble));
  const __m512i second = _mm512_shuffle_epi8(high, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
  return _mm512_or_si512(first, second);
}

inline void decode_24(const uint8_t* codes, int64_t bytes, uint8_t* masks) {
  for (int64_t i = 0; i < bytes; i += 64) {
    const __mmask64 there = _bzhi_u64(~uint64_t{0}, bytes - i < 64 ? static_cast<uint32_t>(bytes - i) : 64);
    _mm512_mask_storeu_epi8(masks + i, there, masks_of_24(_mm512_maskz_loadu_epi8(there, codes + i)));
  }
}

}  // namespace
}  // namespace wanda::cpu

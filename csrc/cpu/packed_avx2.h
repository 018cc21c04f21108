// Packed sparse weights with AVX2. Eight columns at a time: their values are spread to their places by a byte
// shuffle (16-bit types) or a permutation (float32) from a table by the mask, and multiplied with eight
// columns of each x.
//
// bfloat16 is spread straight into the upper halves of float32, which spares a conversion and a shift.
#pragma once

#include "dense_impl.h"
#include "packed_impl.h"
#include "vector_avx2.h"

namespace wanda::cpu {
namespace {

// Entry i: for each of eight columns the place of its value among those that mask i keeps; 0x80: not kept.
struct alignas(64) SpreadTable {
  uint8_t upper[256][32];   // byte shuffle of 16-bit values, in both halves, to the upper bytes of 32 bits
  uint8_t bytes[256][16];   // byte shuffle of 16-bit values
  uint8_t indices[256][8];  // permutation of 32-bit values; 8 where not kept
  constexpr SpreadTable() : upper(), bytes(), indices() {
    for (uint32_t mask = 0; mask < 256; ++mask) {
      uint8_t place = 0;
      for (uint32_t i = 0; i < 8; ++i) {
        const bool kept = (mask >> i & 1) != 0;
        upper[mask][4 * i] = upper[mask][4 * i + 1] = 0x80;
        upper[mask][4 * i + 2] = kept ? static_cast<uint8_t>(2 * place) : 0x80;
        upper[mask][4 * i + 3] = kept ? static_cast<uint8_t>(2 * place + 1) : 0x80;
        bytes[mask][2 * i] = kept ? static_cast<uint8_t>(2 * place) : 0x80;
        bytes[mask][2 * i + 1] = kept ? static_cast<uint8_t>(2 * place + 1) : 0x80;
        indices[mask][i] = kept ? place++ : 8;
      }
    }
  }
};
constexpr SpreadTable kSpread;

// Eight columns in their places. 2:4 has four values for them, and nothing may be read past its last one.
template <PackedFormat format>
inline __m128i spread_16(const uint16_t* values, uint32_t mask) {
  const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(kSpread.bytes[mask]));
  const auto* from = reinterpret_cast<const __m128i*>(values);
  return _mm_shuffle_epi8(format == PackedFormat::kBitmap ? _mm_loadu_si128(from) : _mm_loadl_epi64(from),
                          order);
}

template <PackedFormat format>
inline __m256 spread_bf16(const uint16_t* values, uint32_t mask) {
  const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(kSpread.upper[mask]));
  const auto* from = reinterpret_cast<const __m128i*>(values);
  const __m256i both = format == PackedFormat::kBitmap ? _mm256_broadcastsi128_si256(_mm_loadu_si128(from))
                                                       : _mm256_broadcastq_epi64(_mm_loadl_epi64(from));
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, order));
}

template <PackedFormat format>
inline __m256 spread_32(const uint32_t* values, uint32_t mask) {
  const __m256i order =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread.indices[mask])));
  const auto* from = reinterpret_cast<const float*>(values);
  const __m256 loaded =
      format == PackedFormat::kBitmap ? _mm256_loadu_ps(from) : _mm256_castps128_ps256(_mm_loadu_ps(from));
  const __m256 placed = _mm256_permutevar8x32_ps(loaded, order);
  return _mm256_and_ps(placed, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), order)));
}

template <PackedFormat format, Dtype dtype>
inline __m256 eight_columns(const typename Element<dtype>::Bits* values, uint32_t mask) {
  if constexpr (dtype == Dtype::kFloat32) {
    return spread_32<format>(values, mask);
  } else if constexpr (dtype == Dtype::kBFloat16) {
    return spread_bf16<format>(values, mask);
  } else {
    return _mm256_cvtph_ps(spread_16<format>(values, mask));
  }
}

inline float packed_sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

constexpr int kPackedPrefetch = 2048;  // bytes ahead

// A row's products with a slab of x.
template <PackedFormat format, Dtype dtype, int64_t slab>
void packed_product_row(const PackedWeight& w, int64_t row, const float* x, float* sums) {
  // One chain of additions would wait for itself: four cycles for eight columns.
  constexpr int kChains = slab <= 2 ? 4 : slab == 4 ? 2 : 1;
  const auto* next = static_cast<const typename Element<dtype>::Bits*>(w.values) + packed_start(w, row);
  const uint8_t* codes = w.codes + row * (w.cols / 8);
  __m256 sum[kChains][slab];
  for (auto& chain : sum) {
    for (int b = 0; b < slab; ++b) chain[b] = _mm256_setzero_ps();
  }
  for (int64_t byte = 0; byte < w.cols / 8; byte += kChains) {
    if (byte % 8 == 0) _mm_prefetch(reinterpret_cast<const char*>(next) + kPackedPrefetch, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      const uint32_t mask = packed_mask(format, codes[byte + c]);
      const __m256 weight = eight_columns<format, dtype>(next, mask);
      next += format == PackedFormat::kSparse24 ? 4 : __builtin_popcount(mask);
      const float* columns = x + (byte + c) * slab * 8;
      for (int b = 0; b < slab; ++b)
        sum[c][b] = _mm256_fmadd_ps(weight, _mm256_load_ps(columns + 8 * b), sum[c][b]);
    }
  }
  for (int b = 0; b < slab; ++b) {
    __m256 total = sum[0][b];
    for (int c = 1; c < kChains; ++c) total = _mm256_add_ps(total, sum[c][b]);
    sums[b] = packed_sum(total);
  }
}

template <PackedFormat format, Dtype dtype, int64_t slab>
void packed_product_rows(const PackedWeight& w, const float* x, int64_t batch, float* sums, int64_t begin,
                         int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t b = 0; b < batch; b += slab) {
      packed_product_row<format, dtype, slab>(w, row, x + b * w.cols, sums + row * batch + b);
    }
  }
}

// 64 columns take 9 ns (bitmap of bfloat16, half kept, from the cache of a Zen 3), a loop over bits 68.
template <PackedFormat format, Dtype dtype>
void packed_unpack_row(const PackedWeight& w, int64_t row, typename Element<dtype>::Bits* out) {
  const auto* next = static_cast<const typename Element<dtype>::Bits*>(w.values) + packed_start(w, row);
  const uint8_t* codes = w.codes + row * (w.cols / 8);
  for (int64_t byte = 0; byte < w.cols / 8; ++byte, out += 8) {
    const uint32_t mask = packed_mask(format, codes[byte]);
    if constexpr (dtype == Dtype::kFloat32) {
      _mm256_storeu_ps(reinterpret_cast<float*>(out), spread_32<format>(next, mask));
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), spread_16<format>(next, mask));
    }
    next += format == PackedFormat::kSparse24 ? 4 : __builtin_popcount(mask);
  }
}

template <>
struct PackedSteps<Avx2> {
  static PackedLayout layout(const PackedWeight&) { return {8, true}; }

  static void product(const PackedWeight& w, const void* x, int64_t batch, float* sums, int64_t begin,
                      int64_t end) {
    if (format_of(w) == PackedFormat::kDense) return dense_product<Avx2>(w, x, batch, sums, begin, end);
    by_dtype(w.dtype, [&](auto constant) {
      constexpr Dtype dtype = decltype(constant)::value;
      packed_by_slab(batch, [&](auto size) {
        constexpr int64_t kSlab = decltype(size)::value;
        const auto* columns = static_cast<const float*>(x);
        if (format_of(w) == PackedFormat::kBitmap) {
          packed_product_rows<PackedFormat::kBitmap, dtype, kSlab>(w, columns, batch, sums, begin, end);
        } else {
          packed_product_rows<PackedFormat::kSparse24, dtype, kSlab>(w, columns, batch, sums, begin, end);
        }
      });
    });
  }

  static void unpack(const PackedWeight& w, void* dense, int64_t begin, int64_t end) {
    by_dtype(w.dtype, [&](auto constant) {
      constexpr Dtype dtype = decltype(constant)::value;
      const auto unpack_row = format_of(w) == PackedFormat::kBitmap
                                  ? &packed_unpack_row<PackedFormat::kBitmap, dtype>
                                  : &packed_unpack_row<PackedFormat::kSparse24, dtype>;
      auto* out = static_cast<typename Element<dtype>::Bits*>(dense);
      for (int64_t row = begin; row < end; ++row) unpack_row(w, row, out + row * w.cols);
    });
  }
};

}  // namespace
}  // namespace wanda::cpu

// Packed sparse weights with AVX-512.
//
// bitmap: VPEXPANDW spreads 32 values (bf16), VEXPANDPS 16 (float32); VDPBF16PS multiplies and adds pairs in
// float32. From registers the two are fast on Zen 4, from memory they are microcode. Finding each lane's
// value by counting mask bits (VPOPCNTW, VPERMT2W) took 1.1 x as long. 2:4: x is permuted rather than the
// weights spread: 64 (bf16) or 32 (float32) columns in two registers, from which the indices pick those of 32
// (16) values. Half the products, none with a zero. float16 has no such product: the AVX2 kernels.
//
// Lanes for the tokens of x, and a list of columns instead of spread values, took as long at 16 tokens. Rows
// unpacked once for all slabs gained 5 % at 64 tokens and lost as much at 32.
//
// A file of its own: it needs VBMI, VBMI2 and BF16 beside what Isa::kAvx512 means.
#if defined(__x86_64__)

#if !defined(__clang__)  // as isa_avx512.cpp
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "convert.h"
#include "isa.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                       \
    __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq," \
                          "avx512vl,avx512vbmi,avx512vbmi2,avx512bf16"))),                          \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl")
#pragma GCC target("avx512vbmi,avx512vbmi2,avx512bf16")
#endif

#include "dense_impl.h"
#include "expand_avx512.h"
#include "packed_impl.h"
#include "vector_avx512.h"

namespace wanda::cpu {
namespace {

PackedLayout layout(const PackedWeight& w) {
  if (format_of(w) == PackedFormat::kDense) return {Avx512::kLanes, true};
  if (w.dtype == Dtype::kFloat16) return avx2_kernels().packed_layout(w);
  const bool bf16 = w.dtype == Dtype::kBFloat16;
  return {(bf16 ? 32 : 16) * (format_of(w) == PackedFormat::kBitmap ? 1 : 2), !bf16};
}

// How a format is multiplied: a step takes kColumns of a row's columns, and as many of each row of x.

struct BitmapBf16 {
  using Value = uint16_t;
  using Weight = __m512i;
  using Columns = __m512i;
  static constexpr int64_t kColumns = 32;
  static Weight take(const uint8_t* codes, const Value*& next) {
    uint32_t mask;
    std::memcpy(&mask, codes, sizeof(mask));
    const __m512i weight = _mm512_maskz_expand_epi16(mask, loaded(next));
    next += __builtin_popcount(mask);
    return weight;
  }
  static Columns columns(const Value* x) { return _mm512_load_si512(x); }
  static __m512 add(__m512 sum, Weight weight, Columns x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
  }
};

struct BitmapFloat32 {
  using Value = float;
  using Weight = __m512;
  using Columns = __m512;
  static constexpr int64_t kColumns = 16;
  static Weight take(const uint8_t* codes, const Value*& next) {
    uint16_t mask;
    std::memcpy(&mask, codes, sizeof(mask));
    const __m512 weight = _mm512_maskz_expand_ps(mask, _mm512_castsi512_ps(loaded(next)));
    next += __builtin_popcount(mask);
    return weight;
  }
  static Columns columns(const Value* x) { return _mm512_load_ps(x); }
  static __m512 add(__m512 sum, Weight weight, Columns x) { return _mm512_fmadd_ps(weight, x, sum); }
};

// For value i of 32 (bf16) or 16 (float32): the first column of its group, and where its two bits are.
struct alignas(64) Groups {
  uint16_t first_16[32];
  uint8_t shift_16[64];  // VPMULTISHIFTQB: one shift for each byte; a lane's upper byte is masked off
  uint32_t first_32[16];
  uint32_t shift_32[16];
  constexpr Groups() : first_16(), shift_16(), first_32(), shift_32() {
    for (uint32_t i = 0; i < 32; ++i) {
      first_16[i] = static_cast<uint16_t>(i / 2 * 4);
      shift_16[2 * i] = static_cast<uint8_t>(2 * i);
      if (i < 16) {
        first_32[i] = i / 2 * 4;
        shift_32[i] = 2 * i;
      }
    }
  }
};
constexpr Groups kGroups;
constexpr int kAndOr = 0xea;  // VPTERNLOG: (a & b) | c

struct Sparse24Bf16 {
  using Value = uint16_t;
  struct Weight {
    __m512i values, pick;
  };
  struct Columns {
    __m512i low, high;
  };
  static constexpr int64_t kColumns = 64;
  static Weight take(const uint8_t* codes, const Value*& next) {
    uint64_t indices;
    std::memcpy(&indices, codes, sizeof(indices));
    const __m512i spread = _mm512_multishift_epi64_epi8(_mm512_load_si512(kGroups.shift_16),
                                                        _mm512_set1_epi64(static_cast<long long>(indices)));
    const __m512i first = _mm512_load_si512(kGroups.first_16);
    const __m512i values = _mm512_loadu_si512(next);
    next += kColumns / 2;
    return {values, _mm512_ternarylogic_epi32(spread, _mm512_set1_epi16(3), first, kAndOr)};
  }
  static Columns columns(const Value* x) { return {_mm512_load_si512(x), _mm512_load_si512(x + 32)}; }
  static __m512 add(__m512 sum, Weight weight, Columns x) {
    const __m512i chosen = _mm512_permutex2var_epi16(x.low, weight.pick, x.high);
    return _mm512_dpbf16_ps(sum, (__m512bh)weight.values, (__m512bh)chosen);
  }
};

struct Sparse24Float32 {
  using Value = float;
  struct Weight {
    __m512 values;
    __m512i pick;
  };
  struct Columns {
    __m512 low, high;
  };
  static constexpr int64_t kColumns = 32;
  static Weight take(const uint8_t* codes, const Value*& next) {
    uint32_t indices;
    std::memcpy(&indices, codes, sizeof(indices));
    const __m512i spread =
        _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(indices)), _mm512_load_si512(kGroups.shift_32));
    const __m512i first = _mm512_load_si512(kGroups.first_32);
    const __m512 values = _mm512_loadu_ps(next);
    next += kColumns / 2;
    return {values, _mm512_ternarylogic_epi32(spread, _mm512_set1_epi32(3), first, kAndOr)};
  }
  static Columns columns(const Value* x) { return {_mm512_load_ps(x), _mm512_load_ps(x + 16)}; }
  static __m512 add(__m512 sum, Weight weight, Columns x) {
    return _mm512_fmadd_ps(weight.values, _mm512_permutex2var_ps(x.low, weight.pick, x.high), sum);
  }
};

constexpr int64_t kLine = 512;  // columns of a cache line of codes

// To L2; to L1 took 1.1-1.4 x as long.
inline void prefetch(const void* from, int64_t ahead) {
  _mm_prefetch(static_cast<const char*>(from) + ahead, _MM_HINT_T1);
}

// Products of rows [row, row + rows) with a slab of x, row b of x into sums[r * batch + b]. Several rows at
// once share the loads of x and hide each other's latencies; what the next group will read is prefetched
// meanwhile, values and codes. At batch 1 that reads as fast as memory gives (22 GB/s, one thread); a row
// alone took 1.2-1.4 x as long, at batch 4 1.7 x.
template <class Format, int rows, int slab>
void product_group(const PackedWeight& w, int64_t row, const typename Format::Value* x, int64_t batch,
                   float* sums) {
  using Value = typename Format::Value;
  const Value* next[rows];
  const uint8_t* codes[rows];
  __m512 sum[rows][slab];
  for (int r = 0; r < rows; ++r) {
    next[r] = static_cast<const Value*>(w.values) + packed_start(w, row + r);
    codes[r] = w.codes + (row + r) * (w.cols / 8);
    for (int b = 0; b < slab; ++b) sum[r][b] = _mm512_setzero_ps();
  }
  const int64_t values_ahead = (packed_start(w, row + rows) - packed_start(w, row)) * int64_t{sizeof(Value)};
  const int64_t codes_ahead = rows * (w.cols / 8);
  for (int64_t j = 0; j < w.cols; j += Format::kColumns) {
    typename Format::Weight weight[rows];
    for (int r = 0; r < rows; ++r) {
      if (j % kLine == 0) prefetch(codes[r] + j / 8, codes_ahead);
      prefetch(next[r], values_ahead);
      weight[r] = Format::take(codes[r] + j / 8, next[r]);
    }
    for (int b = 0; b < slab; ++b) {
      const auto columns = Format::columns(x + j * slab + b * Format::kColumns);
      for (int r = 0; r < rows; ++r) sum[r][b] = Format::add(sum[r][b], weight[r], columns);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int b = 0; b < slab; ++b) sums[r * batch + b] = _mm512_reduce_add_ps(sum[r][b]);
  }
}

template <class Format, int slab>
void product_rows(const PackedWeight& w, const void* x, int64_t batch, float* sums, int64_t begin,
                  int64_t end) {
  const auto* columns = static_cast<const typename Format::Value*>(x);
  constexpr int kRows = slab == 1 ? 8 : slab <= 4 ? 4 : 2;  // what the registers hold
  int64_t row = begin;
  const auto slabs = [&](auto rows) {
    for (int64_t b = 0; b < batch; b += slab) {
      product_group<Format, decltype(rows)::value, slab>(w, row, columns + b * w.cols, batch,
                                                         sums + row * batch + b);
    }
    row += decltype(rows)::value;
  };
  while (row + kRows <= end) slabs(Constant<kRows>{});
  while (row < end) slabs(Constant<1>{});
}

void product(const PackedWeight& w, const void* x, int64_t batch, float* sums, int64_t begin, int64_t end) {
  if (format_of(w) == PackedFormat::kDense) return dense_product<Avx512>(w, x, batch, sums, begin, end);
  if (w.dtype == Dtype::kFloat16) return avx2_kernels().packed_product(w, x, batch, sums, begin, end);
  packed_by_slab(batch, [&](auto constant) {
    constexpr int slab = decltype(constant)::value;
    const bool is_bitmap = format_of(w) == PackedFormat::kBitmap, is_bf16 = w.dtype == Dtype::kBFloat16;
    const auto kernel =
        is_bitmap ? (is_bf16 ? &product_rows<BitmapBf16, slab> : &product_rows<BitmapFloat32, slab>)
                  : (is_bf16 ? &product_rows<Sparse24Bf16, slab> : &product_rows<Sparse24Float32, slab>);
    kernel(w, x, batch, sums, begin, end);
  });
}

// Values of 2:4 are loaded as many at a time as there are; those of a bitmap have padding behind them. A Zen
// 5, bfloat16, one thread, from the cache, ns for 64 columns: bitmap 2.7, 2:4 3.4; with masked loads that the
// compiler joined with the expansion, and masks byte by byte, 4.0 and 4.4. From memory, a bitmap of 8960 x
// 1536, two threads: 0.5 ms and 1.8.
template <class T, PackedFormat format>
void unpack_rows(const PackedWeight& w, void* dense, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 64 / sizeof(T);
  using Mask = std::conditional_t<sizeof(T) == 2, uint32_t, uint16_t>;
  const auto* values = static_cast<const T*>(w.values);
  const int64_t bytes = w.cols / 8;
  alignas(64) uint8_t decoded[64];
  for (int64_t row = begin; row < end; ++row) {
    const T* next = values + packed_start(w, row);
    const uint8_t* codes = w.codes + row * bytes;
    T* out = static_cast<T*>(dense) + row * w.cols;
    for (int64_t byte = 0; byte < bytes; byte += 64) {
      const int64_t there = std::min<int64_t>(bytes - byte, 64);
      const uint8_t* masks = codes + byte;
      if constexpr (format == PackedFormat::kSparse24) {
        decode_24(masks, there, decoded);
        masks = decoded;
      }
      for (int64_t i = 0; i < there; i += kColumns / 8, out += kColumns) {
        Mask mask;
        std::memcpy(&mask, masks + i, sizeof(mask));
        __m512i stored;
        if constexpr (format == PackedFormat::kSparse24) {
          stored = loaded_half(next);
          next += kColumns / 2;
        } else {
          stored = loaded(next);
          next += __builtin_popcount(mask);
        }
        if constexpr (sizeof(T) == 2) {
          _mm512_storeu_si512(out, _mm512_maskz_expand_epi16(mask, stored));
        } else {
          _mm512_storeu_si512(out, _mm512_maskz_expand_epi32(mask, stored));
        }
      }
    }
  }
}

void unpack(const PackedWeight& w, void* dense, int64_t begin, int64_t end) {
  const bool is_bitmap = format_of(w) == PackedFormat::kBitmap, is_float32 = w.dtype == Dtype::kFloat32;
  const auto rows = is_bitmap ? (is_float32 ? &unpack_rows<float, PackedFormat::kBitmap>
                                            : &unpack_rows<uint16_t, PackedFormat::kBitmap>)
                              : (is_float32 ? &unpack_rows<float, PackedFormat::kSparse24>
                                            : &unpack_rows<uint16_t, PackedFormat::kSparse24>);
  rows(w, dense, begin, end);
}

}  // namespace

void add_packed_avx512(Kernels& kernels) {
  kernels.packed_layout = &layout;
  kernels.packed_product = &product;
  kernels.packed_unpack = &unpack;
}

}  // namespace wanda::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

// Packed sparse weights, and dense ones: products with a few rows of x and unpacking: what the sets share,
// and both in plain C++.
#pragma once

#include "isa.h"
#include "scalar.h"

namespace wanda::cpu {
namespace {

enum class PackedFormat : int { kBitmap, kSparse24, kDense };

inline PackedFormat format_of(const PackedWeight& weight) {
  if (weight.codes == nullptr) return PackedFormat::kDense;
  return weight.starts != nullptr ? PackedFormat::kBitmap : PackedFormat::kSparse24;
}

// Entry i: the columns of eight that a 2:4 code byte keeps, as bits.
struct PackedMasks {
  uint8_t entry[256];
  constexpr PackedMasks() : entry() {
    for (uint32_t i = 0; i < 256; ++i) {
      const uint32_t low = 1u << (i & 3) | 1u << (i >> 2 & 3);
      const uint32_t high = 1u << (i >> 4 & 3) | 1u << (i >> 6 & 3);
      entry[i] = static_cast<uint8_t>(low | high << 4);
    }
  }
};
constexpr PackedMasks kPackedMasks;

// The kept columns of eight, as bits.
inline uint32_t packed_mask(PackedFormat format, uint8_t code) {
  return format == PackedFormat::kBitmap ? code : kPackedMasks.entry[code];
}

inline int64_t packed_start(const PackedWeight& w, int64_t row) {
  return w.starts != nullptr ? w.starts[row] : row * (w.cols / 2);
}

// f(Constant<rows of x in a slab>{}).
template <class F>
void packed_by_slab(int64_t batch, F f) {
  switch (batch) {
    case 1:
      return f(Constant<int64_t{1}>{});
    case 2:
      return f(Constant<int64_t{2}>{});
    case 4:
      return f(Constant<int64_t{4}>{});
    default:
      return f(Constant<kPackedSlab>{});
  }
}

// layout, product, unpack: as in isa.h.
template <class Vector>
struct PackedSteps;

template <>
struct PackedSteps<Scalar> {
  static PackedLayout layout(const PackedWeight&) { return {8, true}; }

  static void product(const PackedWeight& w, const void* x, int64_t batch, float* sums, int64_t begin,
                      int64_t end) {
    const int64_t slab = batch < kPackedSlab ? batch : kPackedSlab;
    by_dtype(w.dtype, [&](auto constant) {
      constexpr Dtype dtype = decltype(constant)::value;
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t first = 0; first < batch; first += slab) {
          float* out = sums + row * batch + first;
          for (int64_t b = 0; b < slab; ++b) out[b] = 0.0f;
          each_kept<dtype>(w, row, [&](int64_t column, auto bits) {
            const float value = to_float<dtype>(bits);
            const float* at =
                static_cast<const float*>(x) + first * packed_columns(w) + column / 8 * slab * 8 + column % 8;
            for (int64_t b = 0; b < slab; ++b) out[b] += value * at[b * 8];
          });
        }
      }
    });
  }

  static void unpack(const PackedWeight& w, void* dense, int64_t begin, int64_t end) {
    by_dtype(w.dtype, [&](auto constant) {
      constexpr Dtype dtype = decltype(constant)::value;
      for (int64_t row = begin; row < end; ++row) {
        auto* out = static_cast<typename Element<dtype>::Bits*>(dense) + row * w.cols;
        for (int64_t j = 0; j < w.cols; ++j) out[j] = 0;
        each_kept<dtype>(w, row, [&](int64_t column, auto bits) { out[column] = bits; });
      }
    });
  }

 private:
  // visit(column, bits) of what a row keeps.
  template <Dtype dtype, class Visit>
  static void each_kept(const PackedWeight& w, int64_t row, Visit visit) {
    const auto* values = static_cast<const typename Element<dtype>::Bits*>(w.values);
    const PackedFormat format = format_of(w);
    if (format == PackedFormat::kDense) {
      for (int64_t j = 0; j < w.cols; ++j) visit(j, values[row * w.cols + j]);
      return;
    }
    const auto* next = values + packed_start(w, row);
    for (int64_t byte = 0; byte < w.cols / 8; ++byte) {
      uint32_t mask = packed_mask(format, w.codes[row * (w.cols / 8) + byte]);
      for (; mask != 0; mask &= mask - 1) visit(byte * 8 + __builtin_ctz(mask), *next++);
    }
  }
};

}  // namespace
}  // namespace wanda::cpu

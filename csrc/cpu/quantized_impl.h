// Packed weights with values of 8 or 4 bits, products with a few rows of x and unpacking: what the sets
// share, and plain C++. What is computed: wanda_kernels/reference/quantized.py.
#pragma once

#include "packed_impl.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kQuantizedBlock = 64;  // columns
constexpr float kMostOfX8 = 32639.0f, kMostOfX4 = 127.0f;

inline int64_t planes_of(const QuantizedWeight& w) { return w.bits == 8 ? 2 : 1; }
inline uint8_t offset_of(const QuantizedWeight& w) { return w.bits == 8 ? 128 : 8; }

// Blocks that are added up before they are scaled.
inline int64_t blocks_of_part(const QuantizedWeight& w) {
  return w.group < kQuantizedBlock ? 1 : w.group / kQuantizedBlock;
}
inline int64_t parts_of(const QuantizedWeight& w) {
  return (w.cols / kQuantizedBlock + blocks_of_part(w) - 1) / blocks_of_part(w);
}

// Where a row's values begin, or those of its pair.
inline const uint8_t* quantized_values(const QuantizedWeight& w, int64_t row) {
  const int64_t stored = w.bits == 8 ? row : row / 2;
  if (w.starts != nullptr) return w.values + w.starts[stored];
  return w.values + stored * (w.codes != nullptr ? w.cols / 2 : w.cols);
}

inline bool is_high_half(const QuantizedWeight& w, int64_t row) { return w.bits == 4 && row % 2 != 0; }

// Of a slab, from its first row of x.
inline QuantizedColumns slab_of(const QuantizedWeight& w, const QuantizedColumns& x, int64_t first) {
  QuantizedColumns slab = x;
  slab.whole += first * w.cols * planes_of(w);
  slab.starts += first * parts_of(w) * planes_of(w) * kQuantizedLanes;
  slab.scales += first * w.groups;
  return slab;
}

// ---- x.

inline float min_normal() { return float_of_bits(0x00800000u); }
inline float max_finite() { return float_of_bits(0x7f7fffffu); }

// A group's scale; the bits of magnitudes order as the magnitudes do, NaN above all.
template <Dtype dtype>
WANDA_STEP inline float scale_of(const typename Element<dtype>::Bits* x, int64_t count, float most) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<int32_t>(bits_of_float(to_float<dtype>(x[i])) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return float_of_bits(static_cast<uint32_t>(largest)) / most;
}

inline bool is_usable(float scale) { return scale >= min_normal() && scale <= max_finite(); }

// One row of x, row t of its slab; beside 8 bits as int16, without starts.
template <Dtype dtype>
WANDA_PASS void round_token(const QuantizedWeight& w, const typename Element<dtype>::Bits* x, int64_t t,
                            const QuantizedColumns& out) {
  constexpr int64_t kUnit = 32;  // columns, of one group in any case
  const int64_t size = planes_of(w) * kQuantizedBlock;
  const float most = w.bits == 8 ? kMostOfX8 : kMostOfX4;
  if (w.bits == 4) {
    for (int64_t part = 0; part < parts_of(w); ++part) {
      int32_t* starts = out.starts + (part * out.slab + t) * kQuantizedLanes;
      for (int64_t i = 0; i < kQuantizedLanes; ++i) starts[i] = 0;
    }
  }
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t begin = group * w.group, end = begin + w.group < w.cols ? begin + w.group : w.cols;
    const float scale = scale_of<dtype>(x + begin, end - begin, most);
    out.scales[t * w.groups + group] = scale;
    for (int64_t j = begin; j < end; j += kUnit) {
      int32_t whole[kUnit] = {};
      if (is_usable(scale)) {
        for (int64_t i = 0; i < kUnit; ++i) whole[i] = whole_of(to_float<dtype>(x[j + i]) / scale);
      }
      const int64_t block = j / kQuantizedBlock, at = j % kQuantizedBlock;
      int8_t* to = out.whole + (block * out.slab + t) * size;
      if (w.bits == 8) {
        auto* words = reinterpret_cast<int16_t*>(to) + at;
        for (int64_t i = 0; i < kUnit; ++i) words[i] = static_cast<int16_t>(whole[i]);
        continue;
      }
      int32_t* starts = out.starts + (block / blocks_of_part(w) * out.slab + t) * kQuantizedLanes + at / 4;
      for (int64_t i = 0; i < kUnit; ++i) to[at + i] = static_cast<int8_t>(whole[i]);
      for (int64_t i = 0; i < kUnit; i += 4) {
        starts[i / 4] -= 8 * (whole[i] + whole[i + 1] + whole[i + 2] + whole[i + 3]);
      }
    }
  }
}

// round_token(weight, row of x, t, slab) for the rows of slabs [begin, end).
template <Dtype dtype, class RoundToken>
void round_slabs(const QuantizedWeight& w, const void* x, int64_t tokens, const QuantizedColumns& columns,
                 int64_t begin, int64_t end, RoundToken round_token) {
  const HonourDenormals honour;
  const auto* rows = static_cast<const typename Element<dtype>::Bits*>(x);
  for (int64_t slab = begin; slab < end; ++slab) {
    const int64_t first = slab * columns.slab;
    const QuantizedColumns out = slab_of(w, columns, first);
    for (int64_t t = 0; t < columns.slab; ++t) {
      const int64_t token = first + t < tokens ? first + t : tokens - 1;  // filled up with the last one
      round_token(w, rows + token * w.cols, t, out);
    }
  }
}

inline void quantized_round(const QuantizedWeight& w, const void* x, Dtype type, int64_t tokens,
                            const QuantizedColumns& columns, int64_t begin, int64_t end) {
  by_dtype(type, [&](auto constant) {
    constexpr Dtype dtype = decltype(constant)::value;
    round_slabs<dtype>(w, x, tokens, columns, begin, end, &round_token<dtype>);
  });
}

// ---- The weight.

// What a row's sums are multiplied with. A high half counts 16 times (its byte without the low half).
inline float factor_of(const QuantizedWeight& w, int64_t row, int64_t group, float scale) {
  const float factor = float_of_bf16(w.scales[row * w.groups + group]) * scale;
  return is_high_half(w, row) ? factor * 0.0625f : factor;
}

// expand: a row's bytes in their columns, or where they lie in them already; gap_of elsewhere, which is the
// offset, in both halves. dot: the product of these with row t of a slab. only_dot: of a row with the only
// row of x; a set may spare itself the expanded row. unpack_row: each value times its scale in float32,
// rounded.
template <class Vector>
struct QuantizedSteps;

inline uint8_t gap_of(const QuantizedWeight& w) { return w.bits == 8 ? 0x80 : 0x88; }

// A row's value in a byte.
struct StoredValue {
  int32_t shift, mask, offset;
  StoredValue(const QuantizedWeight& w, int64_t row)
      : shift(is_high_half(w, row) ? 4 : 0), mask(w.bits == 8 ? 255 : 15), offset(offset_of(w)) {}
  int32_t operator()(uint8_t byte) const { return (byte >> shift & mask) - offset; }
};

// Value times scale in float32, rounded.
template <Dtype dtype>
WANDA_PASS void scale_row(const QuantizedWeight& w, int64_t row, const uint8_t* stored,
                          typename Element<dtype>::Bits* out) {
  const StoredValue value(w, row);
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t begin = group * w.group, end = begin + w.group < w.cols ? begin + w.group : w.cols;
    const float scale = float_of_bf16(w.scales[row * w.groups + group]);
    for (int64_t j = begin; j < end; ++j) {
      out[j] = from_float<dtype>(static_cast<float>(value(stored[j])) * scale);
    }
  }
}

template <>
struct QuantizedSteps<Scalar> {
  static const uint8_t* expand(const QuantizedWeight& w, int64_t row, uint8_t* out) {
    const uint8_t* next = quantized_values(w, row);
    if (w.codes == nullptr) return next;
    std::memset(out, gap_of(w), static_cast<size_t>(w.cols));
    const PackedFormat format = w.starts != nullptr ? PackedFormat::kBitmap : PackedFormat::kSparse24;
    for (int64_t byte = 0; byte < w.cols / 8; ++byte) {
      uint32_t mask = packed_mask(format, w.codes[row * (w.cols / 8) + byte]);
      for (; mask != 0; mask &= mask - 1) out[byte * 8 + __builtin_ctz(mask)] = *next++;
    }
    return out;
  }

  static float dot(const QuantizedWeight& w, int64_t row, const uint8_t* stored, const QuantizedColumns& x,
                   int64_t t) {
    const int64_t blocks = w.cols / kQuantizedBlock, together = blocks_of_part(w);
    const int64_t size = planes_of(w) * kQuantizedBlock, weighed = is_high_half(w, row) ? 16 : 1;
    const StoredValue value(w, row);
    float lanes[kQuantizedLanes] = {};
    for (int64_t first = 0; first < blocks; first += together) {
      int64_t sums[kQuantizedLanes] = {};
      for (int64_t block = first; block < first + together && block < blocks; ++block) {
        const int8_t* at = x.whole + (block * x.slab + t) * size;
        for (int64_t i = 0; i < kQuantizedBlock; ++i) {
          const int32_t whole = w.bits == 8 ? reinterpret_cast<const int16_t*>(at)[i] : at[i];
          sums[i / 4] += value(stored[block * kQuantizedBlock + i]) * whole;
        }
      }
      for (int64_t lane = 0; lane < kQuantizedLanes; ++lane) {
        const int64_t group = (first * kQuantizedBlock + lane * 4) / w.group;
        const float factor = factor_of(w, row, group, x.scales[t * w.groups + group]);
        lanes[lane] += static_cast<float>(sums[lane] * weighed) * factor;
      }
    }
    for (int64_t half = kQuantizedLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }

  static float only_dot(const QuantizedWeight& w, int64_t row, const QuantizedColumns& x, uint8_t* scratch) {
    return dot(w, row, expand(w, row, scratch), x, 0);
  }

  template <Dtype dtype>
  static void unpack_row(const QuantizedWeight& w, int64_t row, typename Element<dtype>::Bits* out,
                         uint8_t* scratch) {
    scale_row<dtype>(w, row, expand(w, row, scratch), out);
  }
};

template <class Vector>
void quantized_product(const QuantizedWeight& w, const QuantizedColumns& x, float* sums, int64_t begin,
                       int64_t end, void* scratch) {
  const HonourDenormals honour;
  auto* const expanded = static_cast<uint8_t*>(scratch);
  for (int64_t row = begin; row < end; ++row) {
    if (x.batch == 1) {
      sums[row] = QuantizedSteps<Vector>::only_dot(w, row, x, expanded);
      continue;
    }
    const uint8_t* stored = QuantizedSteps<Vector>::expand(w, row, expanded);
    for (int64_t first = 0; first < x.batch; first += x.slab) {
      const QuantizedColumns slab = slab_of(w, x, first);
      for (int64_t t = 0; t < x.slab; ++t) {
        sums[row * x.batch + first + t] = QuantizedSteps<Vector>::dot(w, row, stored, slab, t);
      }
    }
  }
}

template <class Vector>
void quantized_unpack(const QuantizedWeight& w, void* dense, Dtype type, int64_t begin, int64_t end,
                      void* scratch) {
  const HonourDenormals honour;
  by_dtype(type, [&](auto constant) {
    constexpr Dtype dtype = decltype(constant)::value;
    auto* out = static_cast<typename Element<dtype>::Bits*>(dense);
    for (int64_t row = begin; row < end; ++row) {
      QuantizedSteps<Vector>::template unpack_row<dtype>(w, row, out + row * w.cols,
                                                         static_cast<uint8_t*>(scratch));
    }
  });
}

}  // namespace
}  // namespace wanda::cpu

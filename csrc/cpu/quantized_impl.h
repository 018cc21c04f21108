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

// To the nearest whole number, |value| <= 2^22: beside the sum of powers of two a float32 has steps of 1.
inline int32_t whole_of(float value) {
  return static_cast<int32_t>(bits_of_float(value + 12582912.0f)) - 0x4b400000;
}

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

// One row of x, row t of its slab. `split`: of 16 bits the upper bytes and the lower ones apart.
template <Dtype dtype, bool split>
WANDA_PASS void round_token(const QuantizedWeight& w, const typename Element<dtype>::Bits* x, int64_t t,
                            const QuantizedColumns& out) {
  constexpr int64_t kUnit = 32;  // columns, of one group in any case
  const int64_t planes = planes_of(w), size = planes * kQuantizedBlock, lanes = planes * kQuantizedLanes;
  const float most = w.bits == 8 ? kMostOfX8 : kMostOfX4;
  for (int64_t part = 0; part < parts_of(w); ++part) {
    int32_t* starts = out.starts + (part * out.slab + t) * lanes;
    for (int64_t i = 0; i < lanes; ++i) starts[i] = 0;
  }
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t begin = group * w.group, end = begin + w.group < w.cols ? begin + w.group : w.cols;
    const float scale = scale_of<dtype>(x + begin, end - begin, most);
    out.scales[t * w.groups + group] = scale;
    const bool usable = scale >= min_normal() && scale <= max_finite();
    for (int64_t j = begin; j < end; j += kUnit) {
      int32_t whole[kUnit] = {};
      if (usable) {
        for (int64_t i = 0; i < kUnit; ++i) whole[i] = whole_of(to_float<dtype>(x[j + i]) / scale);
      }
      const int64_t block = j / kQuantizedBlock, at = j % kQuantizedBlock;
      int8_t* to = out.whole + (block * out.slab + t) * size;
      int32_t* starts = out.starts + (block / blocks_of_part(w) * out.slab + t) * lanes + at / 4;
      if (w.bits == 4) {
        for (int64_t i = 0; i < kUnit; ++i) to[at + i] = static_cast<int8_t>(whole[i]);
        for (int64_t i = 0; i < kUnit; i += 4) {
          starts[i / 4] -= 8 * (whole[i] + whole[i + 1] + whole[i + 2] + whole[i + 3]);
        }
      } else if (split) {
        int32_t upper[kUnit], lower[kUnit];
        for (int64_t i = 0; i < kUnit; ++i) {
          upper[i] = (whole[i] + 128) >> 8;
          lower[i] = whole[i] - 256 * upper[i];
          to[at + i] = static_cast<int8_t>(upper[i]);
          to[kQuantizedBlock + at + i] = static_cast<int8_t>(lower[i]);
        }
        for (int64_t i = 0; i < kUnit; i += 4) {
          starts[i / 4] -= 128 * (upper[i] + upper[i + 1] + upper[i + 2] + upper[i + 3]);
          starts[kQuantizedLanes + i / 4] -= 128 * (lower[i] + lower[i + 1] + lower[i + 2] + lower[i + 3]);
        }
      } else {
        auto* words = reinterpret_cast<int16_t*>(to) + at;
        for (int64_t i = 0; i < kUnit; ++i) words[i] = static_cast<int16_t>(whole[i]);
      }
    }
  }
}

template <bool split>
void quantized_round(const QuantizedWeight& w, const void* x, Dtype type, int64_t tokens,
                     const QuantizedColumns& columns, int64_t begin, int64_t end) {
  const HonourDenormals honour;
  by_dtype(type, [&](auto constant) {
    constexpr Dtype dtype = decltype(constant)::value;
    const auto* rows = static_cast<const typename Element<dtype>::Bits*>(x);
    for (int64_t slab = begin; slab < end; ++slab) {
      const int64_t first = slab * columns.slab;
      const QuantizedColumns out = slab_of(w, columns, first);
      for (int64_t t = 0; t < columns.slab; ++t) {
        const int64_t token = first + t < tokens ? first + t : tokens - 1;  // filled up with the last one
        round_token<dtype, split>(w, rows + token * w.cols, t, out);
      }
    }
  });
}

// ---- The weight.

// What a row's sums are multiplied with. A high half counts 16 times (its byte without the low half).
inline float factor_of(const QuantizedWeight& w, int64_t row, int64_t group, float scale) {
  const float factor = float_of_bf16(w.scales[row * w.groups + group]) * scale;
  return is_high_half(w, row) ? factor * 0.0625f : factor;
}

// expand: a row's stored values in their columns, the offset elsewhere. dot: the product of these with row t
// of a slab.
template <class Vector>
struct QuantizedSteps;

template <>
struct QuantizedSteps<Scalar> {
  static void expand(const QuantizedWeight& w, int64_t row, uint8_t* out) {
    const uint8_t* next = quantized_values(w, row);
    const int shift = is_high_half(w, row) ? 4 : 0;
    const auto stored = [&](uint8_t byte) {
      return static_cast<uint8_t>(w.bits == 8 ? byte : byte >> shift & 15);
    };
    if (w.codes == nullptr) {
      for (int64_t j = 0; j < w.cols; ++j) out[j] = stored(next[j]);
      return;
    }
    std::memset(out, offset_of(w), static_cast<size_t>(w.cols));
    const PackedFormat format = w.starts != nullptr ? PackedFormat::kBitmap : PackedFormat::kSparse24;
    for (int64_t byte = 0; byte < w.cols / 8; ++byte) {
      uint32_t mask = packed_mask(format, w.codes[row * (w.cols / 8) + byte]);
      for (; mask != 0; mask &= mask - 1) out[byte * 8 + __builtin_ctz(mask)] = stored(*next++);
    }
  }

  static float dot(const QuantizedWeight& w, int64_t row, const uint8_t* stored, const QuantizedColumns& x,
                   int64_t t) {
    const int64_t blocks = w.cols / kQuantizedBlock, together = blocks_of_part(w),
                  size = planes_of(w) * kQuantizedBlock;
    const int32_t offset = offset_of(w), weighed = is_high_half(w, row) ? 16 : 1;
    float lanes[kQuantizedLanes] = {};
    for (int64_t first = 0; first < blocks; first += together) {
      int64_t sums[kQuantizedLanes] = {};
      for (int64_t block = first; block < first + together && block < blocks; ++block) {
        const int8_t* at = x.whole + (block * x.slab + t) * size;
        for (int64_t i = 0; i < kQuantizedBlock; ++i) {
          const int32_t whole = w.bits == 8 ? reinterpret_cast<const int16_t*>(at)[i] : at[i];
          sums[i / 4] += (stored[block * kQuantizedBlock + i] - offset) * whole;
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
};

template <class Vector>
void quantized_product(const QuantizedWeight& w, const QuantizedColumns& x, float* sums, int64_t begin,
                       int64_t end, void* scratch) {
  const HonourDenormals honour;
  auto* stored = static_cast<uint8_t*>(scratch);
  for (int64_t row = begin; row < end; ++row) {
    QuantizedSteps<Vector>::expand(w, row, stored);
    for (int64_t first = 0; first < x.batch; first += x.slab) {
      const QuantizedColumns slab = slab_of(w, x, first);
      for (int64_t t = 0; t < x.slab; ++t) {
        sums[row * x.batch + first + t] = QuantizedSteps<Vector>::dot(w, row, stored, slab, t);
      }
    }
  }
}

// Value times scale in float32, rounded.
template <Dtype dtype>
WANDA_PASS void scale_row(const QuantizedWeight& w, int64_t row, const uint8_t* stored,
                          typename Element<dtype>::Bits* out) {
  const int32_t offset = offset_of(w);
  for (int64_t group = 0; group < w.groups; ++group) {
    const int64_t begin = group * w.group, end = begin + w.group < w.cols ? begin + w.group : w.cols;
    const float scale = float_of_bf16(w.scales[row * w.groups + group]);
    for (int64_t j = begin; j < end; ++j) {
      out[j] = from_float<dtype>(static_cast<float>(stored[j] - offset) * scale);
    }
  }
}

template <class Vector>
void quantized_unpack(const QuantizedWeight& w, void* dense, Dtype type, int64_t begin, int64_t end,
                      void* scratch) {
  const HonourDenormals honour;
  auto* stored = static_cast<uint8_t*>(scratch);
  by_dtype(type, [&](auto constant) {
    constexpr Dtype dtype = decltype(constant)::value;
    auto* out = static_cast<typename Element<dtype>::Bits*>(dense);
    for (int64_t row = begin; row < end; ++row) {
      QuantizedSteps<Vector>::expand(w, row, stored);
      scale_row<dtype>(w, row, stored, out + row * w.cols);
    }
  });
}

}  // namespace
}  // namespace wanda::cpu

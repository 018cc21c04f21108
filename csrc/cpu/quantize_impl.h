// Weights to levels of 8 or 4 bits. Included by isa_<set>.cpp; one thread, some rows. What is computed:
// wanda_kernels/reference/quantize.py, to the bit: every operation is rounded on its own, divisions are
// divisions, and the sixteen running sums and the trees are the reference's for any width of a register.
//
// A group's values, as float32, stay in L1 (a whole row: in L2) while each of the 18 or 4 scales is tried.
// Bytes moved: the weight once, and its levels; divisions bound the time. 13.8 M bfloat16 in groups of 64 to
// 4 bits, CPU seconds of one thread: 0.13 with AVX-512, 0.14 with AVX2, 0.21 without; passes of PyTorch over
// temporaries 0.95. With errors divided by the largest value, not by a power of two: 1.3 x as long.
#pragma once

#include "isa.h"
#include "scalar.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kQuantizeLanes = 16;   // running sums
constexpr int64_t kQuantizeBlock = 128;  // columns, of which the sums are added up by a tree

#if !defined(__clang__)  // GCC looks at functions of the widths, too, that nobody calls here.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

// Registers of float32 in GCC's and Clang's vector extension: one code for all instruction sets.
template <int kBytes>
struct FloatRegisters;
#define WANDA_REGISTERS(bytes)                                                         \
  template <>                                                                          \
  struct FloatRegisters<bytes> {                                                       \
    typedef float Floats __attribute__((vector_size(bytes)));                          \
    typedef float Anywhere __attribute__((vector_size(bytes), aligned(4), may_alias)); \
  }
WANDA_REGISTERS(16);
WANDA_REGISTERS(32);
WANDA_REGISTERS(64);
#undef WANDA_REGISTERS

// A group as float32, zeros up to a multiple of kQuantizeLanes, and what its columns' squares count
// (nullptr: the same).
struct QuantizeGroup {
  const float* values;
  const float* counts;
  int64_t cols;  // with the zeros
  float per_unit;
  float most;  // 128 or 8
};

// The power of two at or below a magnitude, at least the smallest normal one: what errors are divided by,
// so that their squares do not overflow.
inline float unit_of(uint32_t magnitude) {
  const uint32_t power = magnitude & 0x7f800000u;
  return float_of_bits(power > 0x00800000u ? power : 0x00800000u);
}

// The tree over a block's sums.
WANDA_STEP inline float add_up_lanes(const float* lanes) {
  using Four = FloatRegisters<16>::Anywhere;
  const auto four = [&](int at) { return *reinterpret_cast<const Four*>(lanes + at); };
  const FloatRegisters<16>::Floats sums = (four(0) + four(8)) + (four(4) + four(12));
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// That over blocks: sums[0 .. count), a power of two; they are written over.
inline float add_up(float* sums, int64_t count) {
  for (int64_t half = count / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

inline int64_t quantize_blocks(int64_t cols) {
  int64_t blocks = 1;
  while (blocks * kQuantizeBlock < cols) blocks *= 2;
  return blocks;
}

// The squared error with a scale > 0, or 0. `blocks`: quantize_blocks(group.cols) floats.
template <class Vector, bool is_weighted>
WANDA_PASS float quantize_error(const QuantizeGroup& group, float scale, float* blocks) {
  using Floats = typename FloatRegisters<Vector::kBytes>::Floats;
  using Anywhere = typename FloatRegisters<Vector::kBytes>::Anywhere;
  constexpr int kWide = Vector::kBytes / 4, kParts = kQuantizeLanes / kWide;
  const auto all = [](float x) { return Floats{} + x; };
  const Floats scales = all(scale), divisor = all(scale > 0 ? scale : 1.0f), per_unit = all(group.per_unit);
  const Floats low = all(-group.most), high = all(group.most - 1), step_of_1 = all(kStepOf1);
  const int64_t count = quantize_blocks(group.cols);
  for (int64_t block = 0; block < count; ++block) {
    const int64_t begin = block * kQuantizeBlock;
    const int64_t end = begin + kQuantizeBlock < group.cols ? begin + kQuantizeBlock : group.cols;
    Floats sums[kParts] = {};
    for (int64_t j = begin; j < end; j += kQuantizeLanes) {
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = j + part * kWide;
        const Floats value = *reinterpret_cast<const Anywhere*>(group.values + at);
        Floats level = value / divisor;
        level = level < low ? low : level;
        level = level > high ? high : level;
        level = (level + step_of_1) - step_of_1;
        const Floats error = (level * scales - value) * per_unit;
        Floats square = error * error;
        if constexpr (is_weighted) square *= *reinterpret_cast<const Anywhere*>(group.counts + at);
        sums[part] += square;
      }
    }
    float lanes[kQuantizeLanes];
    for (int part = 0; part < kParts; ++part) {
      *reinterpret_cast<Anywhere*>(lanes + part * kWide) = sums[part];
    }
    blocks[block] = add_up_lanes(lanes);
  }
  return add_up(blocks, count);
}

// The scale of the least error, the first of equals; 0 where none is finite.
template <class Vector>
float quantize_scale(const QuantizeGroup& group, float largest, float highest, float* blocks) {
  const bool is_8 = group.most == 128.0f;
  const float of_8[4] = {127.0f, 127.5f, 128.0f, 129.0f};
  float scale = 0, least = __builtin_inff();
  for (int i = 0; i < (is_8 ? 4 : 18); ++i) {
    const float plain = largest / (is_8 ? of_8[i] : 6.5f + 0.25f * static_cast<float>(i));
    const float tried = float_of_bf16(bf16_of_float(plain < highest ? plain : highest));
    const float error = group.counts != nullptr ? quantize_error<Vector, true>(group, tried, blocks)
                                                : quantize_error<Vector, false>(group, tried, blocks);
    if (error < least) {
      least = error;
      scale = tried;
    }
  }
  return scale;
}

inline void quantize_levels(const float* values, int64_t cols, float scale, float most, int8_t* levels) {
  const float divisor = scale > 0 ? scale : __builtin_inff();  // of 0: all levels are 0
  for (int64_t i = 0; i < cols; ++i) {
    float level = values[i] / divisor;
    level = level < -most ? -most : level;
    level = level > most - 1 ? most - 1 : level;
    levels[i] = static_cast<int8_t>(whole_of(level));
  }
}

// The bits of a group's largest magnitude, which order as magnitudes do, NaN above all.
inline uint32_t largest_of(const float* values, int64_t cols) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < cols; ++i) {
    const uint32_t magnitude = bits_of_float(values[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// work(row, number of the group, its first column, its columns) for all groups of rows [begin, end), whose
// values are in values[0 .. columns); until it returns false.
template <Dtype dtype, class Work>
void over_groups_of(const QuantizeParams& p, int64_t begin, int64_t end, float* values, Work work) {
  const auto* weight = static_cast<const typename Element<dtype>::Bits*>(p.weight);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t number = 0; number < p.groups; ++number) {
      const int64_t first = number * p.group, left = p.cols - first, cols = left < p.group ? left : p.group;
      const auto* from = weight + row * p.cols + first;
      for (int64_t i = 0; i < cols; ++i) values[i] = to_float<dtype>(from[i]);
      if (!work(row, number, first, cols)) return;
    }
  }
}

inline float most_of(const QuantizeParams& p) { return p.bits == 8 ? 128.0f : 8.0f; }

template <class Vector, Dtype dtype>
int64_t quantize_typed(const QuantizeParams& p, int64_t begin, int64_t end, float* scratch) {
  const int64_t padded = (p.group + kQuantizeLanes - 1) / kQuantizeLanes * kQuantizeLanes;
  float *values = scratch, *counts = scratch + padded, *blocks = scratch + 2 * padded;
  const float most = most_of(p);
  const double most_of_dtype = dtype == Dtype::kFloat16    ? 65504.0
                               : dtype == Dtype::kBFloat16 ? 3.3895313892515355e38
                                                           : 3.4028234663852886e38;
  const auto highest = static_cast<float>(0.99 * most_of_dtype / static_cast<double>(most));
  int64_t not_finite = 0;
  over_groups_of<dtype>(p, begin, end, values, [&](int64_t row, int64_t number, int64_t first, int64_t cols) {
    for (int64_t i = cols; i < padded; ++i) values[i] = 0;
    if (p.importance != nullptr) {
      for (int64_t i = 0; i < padded; ++i) counts[i] = i < cols ? p.importance[first + i] : 0.0f;
    }
    const uint32_t largest = largest_of(values, cols);
    if (largest >= 0x7f800000u) {
      ++not_finite;
      return true;
    }
    const QuantizeGroup group{values, p.importance != nullptr ? counts : nullptr, padded,
                              1.0f / unit_of(largest), most};
    const float scale = quantize_scale<Vector>(group, float_of_bits(largest), highest, blocks);
    p.scales[row * p.groups + number] = bf16_of_float(scale);
    quantize_levels(values, cols, scale, most, p.levels + row * p.cols + first);
    return true;
  });
  return not_finite;
}

template <class Vector>
int64_t quantize_run(const QuantizeParams& p, int64_t begin, int64_t end, float* scratch) {
  const HonourDenormals honour_denormals;
  int64_t not_finite = 0;
  by_dtype(p.dtype, [&](auto dtype) {
    not_finite = quantize_typed<Vector, decltype(dtype)::value>(p, begin, end, scratch);
  });
  return not_finite;
}

// ---- Levels that a weight already consists of.

// Whether the nearest levels times a scale > 0, rounded to the dtype, are the values. Most scales fail among
// the first ones.
template <Dtype dtype>
bool is_exact(const float* values, int64_t cols, float scale, float most) {
  for (int64_t begin = 0; begin < cols; begin += kQuantizeLanes) {
    const int64_t end = begin + kQuantizeLanes < cols ? begin + kQuantizeLanes : cols;
    int others = 0;
    for (int64_t i = begin; i < end; ++i) {
      float level = values[i] / scale;
      level = level < -most ? -most : level;
      level = level > most - 1 ? most - 1 : level;
      level = (level + kStepOf1) - kStepOf1;
      others += to_float<dtype>(from_float<dtype>(level * scale)) != values[i];
    }
    if (others > 0) return false;
  }
  return true;
}

// A scale that gives the values back, or 0. The largest is a level times it, rounded: each level is tried,
// and each scale that this rounding may hide.
template <Dtype dtype>
float exact_scale(const float* values, int64_t cols, float largest, float most) {
  const int steps[3] = {0, 1, -1};
  for (float level = most; level > 0; --level) {
    const uint16_t near = bf16_of_float(largest / level);
    for (const int step : steps) {
      const float scale = float_of_bf16(static_cast<uint16_t>(near + step));
      if (scale > 0 && is_exact<dtype>(values, cols, scale, most)) return scale;
    }
  }
  return 0;
}

inline bool exact_levels_run(const QuantizeParams& p, int64_t begin, int64_t end, float* scratch) {
  const HonourDenormals honour_denormals;
  const float most = most_of(p);
  bool are_exact = true;
  by_dtype(p.dtype, [&](auto dtype) {
    over_groups_of<decltype(dtype)::value>(
        p, begin, end, scratch, [&](int64_t row, int64_t number, int64_t first, int64_t cols) {
          const float largest = float_of_bits(largest_of(scratch, cols));
          const float scale =
              largest > 0 ? exact_scale<decltype(dtype)::value>(scratch, cols, largest, most) : 0.0f;
          are_exact = scale > 0 || largest == 0;
          p.scales[row * p.groups + number] = bf16_of_float(scale);
          quantize_levels(scratch, cols, scale, most, p.levels + row * p.cols + first);
          return are_exact;
        });
  });
  return are_exact;
}

}  // namespace
}  // namespace wanda::cpu

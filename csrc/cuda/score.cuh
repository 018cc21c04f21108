// Elements, scores and their order. score = float32(|w|) * norm: one multiplication, rounded to nearest, with
// denormals. A device multiplication gives every NaN the bits 0x7fffffff, so where no norm has its sign bit
// set the bits of a score are below 2^31 and order as integers, NaN largest.
#pragma once

#include "../common/dtype.h"
#include "platform.cuh"

namespace wanda::cuda {

template <Dtype kDtype>
WANDA_DEVICE float to_float(typename Element<kDtype>::Bits bits) {
  if constexpr (kDtype == Dtype::kFloat32) {
    return __uint_as_float(bits);
  } else if constexpr (kDtype == Dtype::kBFloat16) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    return half_to_float(bits);
  }
}

// To the nearest element.
template <Dtype kDtype>
WANDA_DEVICE typename Element<kDtype>::Bits from_float(float value) {
  if constexpr (kDtype == Dtype::kFloat32) {
    return __float_as_uint(value);
  } else if constexpr (kDtype == Dtype::kBFloat16) {
    return float_to_bfloat16(value);
  } else {
    return float_to_half(value);
  }
}

template <Dtype kDtype>
WANDA_DEVICE float score_of(typename Element<kDtype>::Bits bits, float norm) {
  return __fmul_rn(fabsf(to_float<kDtype>(bits)), norm);
}

// A block's matrix is blockIdx.y: its first row, and the norm of a column. (Columns of all norms are below
// 2^32: 32 bits beside the pointer, which is no register, take fewer than a pointer of the block's own.)
template <class Params>
WANDA_DEVICE int64_t first_row_of(const Params& params) {
  return static_cast<int64_t>(blockIdx.y) * params.norm_rows;
}
template <class Params>
WANDA_DEVICE const float* norm_at(const Params& params, uint32_t column) {
  return params.norm + (blockIdx.y * static_cast<uint32_t>(params.cols) + column);
}

// The two 16-bit elements of a word.
template <Dtype kDtype>
WANDA_DEVICE void unpack(uint32_t word, float& low, float& high) {
  if constexpr (kDtype == Dtype::kBFloat16) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  } else {
    low = half_to_float(static_cast<uint16_t>(word));
    high = half_to_float(static_cast<uint16_t>(word >> 16));
  }
}

WANDA_DEVICE float component(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
WANDA_DEVICE uint32_t component(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Four consecutive elements: quad `quad` of a chunk of 16 bytes.
template <Dtype kDtype>
WANDA_DEVICE void quad_values(const uint4& chunk, int quad, float (&value)[4]) {
  if constexpr (kDtype == Dtype::kFloat32) {
    for (int i = 0; i < 4; ++i) value[i] = __uint_as_float(component(chunk, i));
  } else {
    unpack<kDtype>(component(chunk, 2 * quad), value[0], value[1]);
    unpack<kDtype>(component(chunk, 2 * quad + 1), value[2], value[3]);
  }
}

// Their scores.
template <Dtype kDtype>
WANDA_DEVICE void quad_scores(const uint4& chunk, int quad, const float4& norm, float (&score)[4]) {
  float value[4];
  quad_values<kDtype>(chunk, quad, value);
  for (int i = 0; i < 4; ++i) score[i] = __fmul_rn(fabsf(value[i]), component(norm, i));
}

// Any score as an unsigned integer in the order of torch.sort: -0.0 equals 0.0, every NaN is the largest.
WANDA_DEVICE uint32_t ordered_key(float score) {
  const uint32_t bits = __float_as_uint(score);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
  if ((bits & 0x7fffffffu) == 0) return 0x80000000u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace wanda::cuda

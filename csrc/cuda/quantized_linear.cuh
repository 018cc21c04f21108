// y = x W^T + bias for a packed W with values of 8 or 4 bits, or for each expert's W and rows of x; what
// rounds x before; and unpacking.
//
// Algorithm: quantized.cuh walks four rows of W, sixteen columns a lane, as signed bytes; x is rounded to
// whole numbers of two signed bytes beside 8 bits, of one beside 4, so that dp4a multiplies and adds four
// columns at once, exactly. Without groups a lane's sums stay integers to the end; with groups those of its
// sixteen columns are scaled at once, which costs the same for 32, 64 and 128 columns. Lanes are added by a
// butterfly, warps in order: the same bits in every run, but not the order of the CPU's lanes.
//
// x is rounded by a kernel of its own: each block would do it again, for half of what its product costs.
//
// Assumes: as quantized.cuh.
//
// A block: four rows, all of their columns, which its warps share out. More tokens than there is room for are
// taken in turns, which read the block's weights again, by then from L2. `ends` may hold anything: rows
// outside of x are nobody's.
//
// Bytes: values, codes and scales once, 0.63 an element of 8 bits at 50 %, 0.38 of 4; x from L1 and L2.
#pragma once

#include "quantized.cuh"

namespace wanda::cuda {

// to_float and from_float of a type that only the launch knows.
WANDA_DEVICE float element_at(const void* from, int64_t i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  return dtype == Dtype::kBFloat16 ? to_float<Dtype::kBFloat16>(bits) : to_float<Dtype::kFloat16>(bits);
}

WANDA_DEVICE uint32_t element_of(float value, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return __float_as_uint(value);
  return dtype == Dtype::kBFloat16 ? from_float<Dtype::kBFloat16>(value) : from_float<Dtype::kFloat16>(value);
}

// A block: a group of a row of x.
__global__ void __launch_bounds__(kRoundThreads) round_kernel(const RoundParams params) {
  WANDA_DYNAMIC_SHARED(memory);
  const uint32_t groups = static_cast<uint32_t>(params.groups), token = blockIdx.x / groups;
  const uint32_t begin = blockIdx.x % groups * static_cast<uint32_t>(params.group);
  const uint32_t end = min(begin + static_cast<uint32_t>(params.group), static_cast<uint32_t>(params.cols));
  const uint32_t planes = static_cast<uint32_t>(params.bits) / 4;
  const int64_t first = token * params.cols;
  uint32_t largest = 0;  // bits of magnitudes order as the magnitudes do, NaN above all
  for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const float value = element_at(params.x, first + i, params.dtype);
    largest = max(largest, __float_as_uint(value) & 0x7fffffffu);
  }
  largest = block_max(largest, reinterpret_cast<uint32_t*>(memory));
  const float scale = __fdiv_rn(__uint_as_float(largest), planes == 2 ? 32639.0f : 127.0f);
  if (threadIdx.x == 0) params.scales[blockIdx.x] = scale;
  const uint32_t bits = __float_as_uint(scale);
  const bool is_usable = bits >= 0x00800000u && bits < 0x7f800000u;  // normal and finite
  int8_t* const whole = params.whole + first * planes;
  for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const float value = element_at(params.x, first + i, params.dtype);
    const int32_t rounded = is_usable ? static_cast<int32_t>(rintf(__fdiv_rn(value, scale))) : 0;
    const int32_t upper = (rounded + 128) >> 8;
    int8_t* const to = whole + i / 16 * planes * 16 + i % 16;
    if (planes == 2) to[0] = static_cast<int8_t>(upper);
    to[(planes - 1) * 16] = static_cast<int8_t>(planes == 2 ? rounded - 256 * upper : rounded);
  }
}

// The products of a block's rows of one weight with a few rows of x.
template <int kBits, bool kGrouped, int kTokens>
struct QuantizedProduct {
  static constexpr int kPlanes = kBits / 4;

  const int8_t* whole;
  const float* scales;
  uint32_t groups, token[kTokens], token_scales[kTokens];  // where it begins in `whole` and `scales`
  int group_bits;
  int32_t sum[kGrouped ? 1 : kQuantizedRows][kGrouped ? 1 : kTokens][2] = {};
  float total[kQuantizedRows][kTokens] = {};

  WANDA_DEVICE QuantizedProduct(const QuantizedWeight& weight, const int8_t* whole, const float* scales,
                                int tokens)
      : whole(opaque(whole)),
        scales(opaque(scales)),
        groups(static_cast<uint32_t>(weight.groups)),
        group_bits(group_bits_of(weight)) {
#pragma unroll
    for (int b = 0; b < kTokens; ++b) {
      const uint32_t at = b == 0 ? 0 : min(b, tokens - 1);
      token[b] = opaque(at * static_cast<uint32_t>(weight.cols) * kPlanes);
      token_scales[b] = kGrouped ? opaque(at * groups) : 0;
    }
  }

  WANDA_DEVICE static int32_t dot(const Elements& elements, const uint4& x, int32_t sum) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum = __dp4a(static_cast<int>(elements.four[i]), static_cast<int>(component(x, i)), sum);
    }
    return sum;
  }

  WANDA_DEVICE void add(uint32_t column, const Elements (&elements)[kQuantizedRows]) {
#pragma unroll
    for (int b = 0; b < kTokens; ++b) {
      const int8_t* const from = whole + (token[b] + column * kPlanes);
      const uint4 first = ldg_16(from), second = kPlanes == 2 ? ldg_16(from + 16) : first;
      const float scale = kGrouped ? __ldg(scales + token_scales[b] + (column >> group_bits)) : 0;
#pragma unroll
      for (int r = 0; r < kQuantizedRows; ++r) {
        if constexpr (kGrouped) {
          int32_t own = dot(elements[r], second, 0);
          own = kPlanes == 2 ? own + 256 * dot(elements[r], first, 0) : own >> 4;
          total[r][b] = __fmaf_rn(static_cast<float>(own), __fmul_rn(elements[r].scale, scale), total[r][b]);
        } else {
          sum[r][b][0] = dot(elements[r], first, sum[r][b][0]);
          sum[r][b][1] = dot(elements[r], second, sum[r][b][1]);
        }
      }
    }
  }

  WANDA_DEVICE void totals(float (&to)[kQuantizedRows * kTokens]) const {
#pragma unroll
    for (int r = 0; r < kQuantizedRows; ++r) {
#pragma unroll
      for (int b = 0; b < kTokens; ++b) {
        float own = total[r][b];
        if constexpr (!kGrouped) {
          own = __fmaf_rn(static_cast<float>(sum[r][b][0]), 256.0f, static_cast<float>(sum[r][b][1]));
        }
        to[r * kTokens + b] = own;
      }
    }
  }
};

// `weight`: of an expert, as are x, y and their `tokens`.
template <int kBits, QuantizedForm kForm, bool kGrouped, int kTokens>
WANDA_DEVICE void quantized_linear_block(const QuantizedLinearParams& params, const QuantizedWeight& weight,
                                         int64_t first_token, int tokens, int64_t block,
                                         unsigned char* memory, const QuantizedPlan& plan) {
  constexpr int kSums = kQuantizedRows * kTokens;
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
  float* const sums = reinterpret_cast<float*>(memory);
  const int64_t first_row = block * kQuantizedRows;
  const float* const scales = params.scales + first_token * weight.groups;
  QuantizedProduct<kBits, kGrouped, kTokens> product(
      weight, params.whole + first_token * weight.cols * (kBits / 4), scales, tokens);
  walk_quantized<kBits, kForm, kGrouped>(
      weight, first_row, memory + warps * kSums * 4, plan,
      [&](uint32_t column, const Elements(&elements)[kQuantizedRows]) { product.add(column, elements); });
  float sum[kSums];
  product.totals(sum);
  const float own = warp_sums(sum);
  if (lane_of(thread) < kSums) sums[thread / kWarp * kSums + lane_of(thread)] = own;
  __syncthreads();
  const int r = thread / kTokens, b = thread % kTokens;
  if (r >= kQuantizedRows || b >= tokens || first_row + r >= weight.rows) return;
  float total = 0;
  for (int w = 0; w < warps; ++w) total = __fadd_rn(total, sums[w * kSums + thread]);
  if constexpr (!kGrouped) {
    const float scale = __uint_as_float(static_cast<uint32_t>(weight.scales[first_row + r]) << 16);
    total = __fmul_rn(total, __fmul_rn(scale, scales[b]));
  }
  if (params.bias != nullptr) total = __fadd_rn(total, element_at(params.bias, first_row + r, params.dtype));
  const int64_t at = (first_token + b) * weight.rows + first_row + r;
  if (params.dtype == Dtype::kFloat32) {
    static_cast<float*>(params.y)[at] = total;
  } else {
    static_cast<uint16_t*>(params.y)[at] = static_cast<uint16_t>(element_of(total, params.dtype));
  }
}

// The grid: blocks of a weight's rows x experts.
template <int kBits, QuantizedForm kForm, bool kGrouped, int kTokens>
__global__ void __launch_bounds__(kQuantizedWarps* kWarp, kTokens == 1 ? 4 : 0)
    quantized_linear_kernel(const QuantizedLinearParams params, const QuantizedPlan plan) {
  WANDA_DYNAMIC_SHARED(memory);
  const int32_t last = static_cast<int32_t>(params.tokens);
  int32_t begin = 0, end = last;
  QuantizedWeight weight = params.weight;
  if (params.ends != nullptr) {
    const uint32_t expert = blockIdx.y;
    begin = expert == 0 ? 0 : max(__ldg(params.ends + expert - 1), 0);
    end = min(__ldg(params.ends + expert), last);
    weight.rows /= params.experts;
    const int64_t first = expert * weight.rows, stored = kBits == 8 ? first : first / 2;
    weight.scales += first * weight.groups;
    if constexpr (kForm != QuantizedForm::kDense) weight.codes += first * (weight.cols / 8);
    if constexpr (kForm == QuantizedForm::kBitmap) {
      weight.starts += stored;
    } else {
      weight.values += stored * (kForm == QuantizedForm::kDense ? weight.cols : weight.cols / 2);
    }
  }
#pragma unroll 1
  while (begin < end) {
    quantized_linear_block<kBits, kForm, kGrouped, kTokens>(params, weight, begin, min(end - begin, kTokens),
                                                            blockIdx.x, memory, plan);
    begin += kTokens;
    if (begin < end) __syncthreads();  // the sums of this turn have been read
  }
}

// Each value times its scale in float32, rounded. A block: four rows.
template <int kBits, QuantizedForm kForm>
__global__ void __launch_bounds__(kQuantizedWarps* kWarp)
    unpack_quantized_kernel(const QuantizedWeight weight, void* dense, const Dtype dtype,
                            const QuantizedPlan plan) {
  WANDA_DYNAMIC_SHARED(memory);
  const int64_t first_row = int64_t{blockIdx.x} * kQuantizedRows;
  walk_quantized<kBits, kForm, true>(
      weight, first_row, memory, plan, [&](uint32_t column, const Elements(&elements)[kQuantizedRows]) {
#pragma unroll
        for (int r = 0; r < kQuantizedRows; ++r) {
          if (first_row + r >= weight.rows) continue;
          uint32_t element[16];
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            const uint32_t at_top = elements[r].four[i / 4] << (24 - i % 4 * 8);
            const int32_t level = static_cast<int32_t>(at_top) >> (32 - kBits);
            element[i] = element_of(__fmul_rn(static_cast<float>(level), elements[r].scale), dtype);
          }
          const int64_t at = (first_row + r) * weight.cols + column;
          if (dtype == Dtype::kFloat32) {
            uint32_t* const to = static_cast<uint32_t*>(dense) + at;
#pragma unroll
            for (int i = 0; i < 16; i += 4) {
              store_16(to + i, element[i], element[i + 1], element[i + 2], element[i + 3]);
            }
          } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) element[i] = element[2 * i] | element[2 * i + 1] << 16;
            uint16_t* const to = static_cast<uint16_t*>(dense) + at;
            store_16(to, element[0], element[1], element[2], element[3]);
            store_16(to + 8, element[4], element[5], element[6], element[7]);
          }
        }
      });
}

}  // namespace wanda::cuda

// Element types of the kernels' raw pointers, on the CPU and on CUDA. No torch header: kernels also compile
// on their own.
#pragma once

#include <cstdint>

namespace wanda {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// How an element lies in memory. to_float<dtype>(bits) and from_float<dtype>(value) are its value and the
// element nearest to a float32: cpu/convert.h, cuda/score.cuh.
template <Dtype dtype>
struct Element {
  using Bits = uint16_t;
  static constexpr int kChunk = 8;  // elements in 16 bytes
};
template <>
struct Element<Dtype::kFloat32> {
  using Bits = uint32_t;
  static constexpr int kChunk = 4;
};

// A constant as an argument: decltype(argument)::value.
template <auto constant>
struct Constant {
  static constexpr auto value = constant;
};

// f(Constant<dtype>{}).
template <class F>
auto by_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::kFloat32) return f(Constant<Dtype::kFloat32>{});
  if (dtype == Dtype::kBFloat16) return f(Constant<Dtype::kBFloat16>{});
  return f(Constant<Dtype::kFloat16>{});
}

}  // namespace wanda

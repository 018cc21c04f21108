// What products with packed weights share, whatever their values are: the shapes of few rows of x, sums that
// become outputs, experts one after the other; and many rows of x with a weight that is unpacked a band of
// its rows at a time.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "../checks.h"
#include "convert.h"

namespace wanda::cpu {

constexpr int64_t kFewTokens = 32;  // rows of x at most that kernels take; more with the unpacked weight
// Larger ones lose in the product what its fixed costs, once a band and thread, no longer win: 11008 x 4096,
// Zen 4, 64 tokens of bfloat16 on two threads, as a multiple of the dense
// product: 1.30, 1.18, 1.13, 1.10, 1.11 with bands of 1, 2, 4, 8, 16 MiB; beyond, they leave the cache.
constexpr int64_t kBandBytes = int64_t{8} << 20;

// The type in which torch multiplies matrices of `type` here: itself, or float32 where this processor has no
// instructions for it. As product_dtype of wanda_kernels/packed/weight.py, which has the measurement.
inline at::ScalarType product_type(at::ScalarType type) {
  const auto has = [](const char* name) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    return op.has_value() && op->typed<bool()>().call();
  };
  static const bool has_bf16 = has("mkldnn::_is_mkldnn_bf16_supported");
  static const bool has_fp16 = has("mkldnn::_is_mkldnn_fp16_supported");
  return (type == at::kBFloat16 && !has_bf16) || (type == at::kHalf && !has_fp16) ? at::kFloat : type;
}

// y [tokens, rows] = x [tokens, cols] W^T + bias. unpack(begin, end, dense): rows of W into `dense` [end -
// begin, cols] of x's dtype. Bands begin at multiples of `unit`, a power of two, all in the same memory.
// Their size does not depend on the number of threads, so that products are cut in the same way.
//
// A power of two of rows: oneDNN gives threads whole blocks of 64, and a band that is no multiple of 64 for
// each takes far longer. Zen 5, two threads, 64 tokens, 8960 x 1536 in bands of 1280, 1344, 2048, 2240, 2560,
// 2720 rows: 3.1, 5.3, 3.3, 4.8, 3.7, 4.6 ms.
template <class Unpack>
void multiply_in_bands(int64_t rows, int64_t unit, const at::Tensor& x, const OptionalTensor& bias,
                       const at::Tensor& y, Unpack unpack) {
  // A graph of gradients would keep a band that the next one overwrites.
  const at::AutoDispatchBelowAutograd no_gradients;
  const int64_t cols = x.size(1);
  const at::ScalarType type = product_type(x.scalar_type());
  const at::Tensor columns = x.to(type), added = bias ? bias->to(type) : at::Tensor();
  const auto fitting = static_cast<uint64_t>(kBandBytes / (cols * columns.element_size()));
  const int64_t band = std::min(std::max(static_cast<int64_t>(std::bit_floor(fitting)), unit), rows);
  const at::Tensor unpacked = at::empty({band, cols}, x.options());
  const bool is_own = type == x.scalar_type();
  const at::Tensor converted = is_own ? unpacked : at::empty({band, cols}, columns.options());
  for (int64_t first = 0; first < rows; first += band) {
    const int64_t count = std::min(band, rows - first);
    const at::Tensor dense = unpacked.narrow(0, 0, count);
    unpack(first, first + count, dense);
    const at::Tensor weight = converted.narrow(0, 0, count);
    if (!is_own) weight.copy_(dense);
    at::Tensor out = y.narrow(1, first, count);
    if (added.defined()) {
      out.copy_(at::addmm(added.narrow(0, first, count), columns, weight.t()));
    } else if (is_own) {
      at::mm_out(out, columns, weight.t());
    } else {
      out.copy_(at::mm(columns, weight.t()));
    }
  }
}

// `tokens`, filled up to what kernels take: a power of two, or whole slabs.
inline int64_t batch_of(int64_t tokens, int64_t slab) {
  int64_t batch = 1;
  while (batch < tokens) batch = batch < slab ? 2 * batch : batch + slab;
  return batch;
}

// Of a product: [.., rows].
inline std::vector<int64_t> shape_of(const at::Tensor& x, int64_t rows) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  return shape;
}

// Columns [0, count) of `tokens` rows of `to`, `stride` apart, from sums [count][batch]. `bias` may be
// nullptr.
template <Dtype dtype, class T>
void store_sums(const float* sums, int64_t batch, int64_t tokens, int64_t count, const T* bias, T* to,
                int64_t stride) {
  for (int64_t b = 0; b < tokens; ++b, to += stride) {
    for (int64_t row = 0; row < count; ++row) {
      const float sum = sums[row * batch + b];
      to[row] = from_float<dtype>(bias != nullptr ? sum + to_float<dtype>(bias[row]) : sum);
    }
  }
}

// few(expert, first, count) or many(expert, first, count) for each expert that has rows of x: `count` of them
// from `first` on. Returns the first row that is no expert's.
template <class Few, class Many>
int64_t over_experts(const at::Tensor& ends, Few few, Many many) {
  const int32_t* const end = ends.const_data_ptr<int32_t>();
  int64_t first = 0;
  for (int64_t expert = 0; expert < ends.size(0); ++expert) {
    const int64_t count = end[expert] - first;
    if (count > kFewTokens) {
      many(expert, first, count);
    } else if (count > 0) {
      few(expert, first, count);
    }
    first = end[expert];
  }
  return first;
}

}  // namespace wanda::cpu

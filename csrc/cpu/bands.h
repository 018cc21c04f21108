// Dense products with a weight that is unpacked a band of its rows at a time.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cstdint>

#include "../checks.h"

namespace wanda::cpu {

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
// begin, cols] of x's dtype. Bands begin at multiples of `unit`, all in the same memory. Their size does not
// depend on the number of threads, so that products are cut in the same way.
template <class Unpack>
void multiply_in_bands(int64_t rows, int64_t unit, const at::Tensor& x, const OptionalTensor& bias,
                       const at::Tensor& y, Unpack unpack) {
  // What is multiplied here is this operator's own: autocast would turn it back, and a graph of gradients would keep
  // a band that the next one overwrites.
  const at::AutoDispatchBelowAutograd no_gradients;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t cols = x.size(1);
  const at::ScalarType type = product_type(x.scalar_type());
  const at::Tensor columns = x.to(type), added = bias ? bias->to(type) : at::Tensor();
  const int64_t fitting = kBandBytes / (cols * columns.element_size()) / unit * unit;
  const int64_t band = std::min(std::max(fitting, unit), rows);
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

}  // namespace wanda::cpu

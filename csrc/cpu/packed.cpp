// Launchers of packed sparse weights on CPU tensors: checks, the layout of x, threads, registration.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "convert.h"
#include "launch.h"

namespace wanda::cpu {

namespace {

constexpr int64_t kPackedBatch = 32;  // rows of x at most

PackedWeight bitmap_weight(const char* op, const at::Tensor& values, const at::Tensor& bitmap,
                           const at::Tensor& starts) {
  check_bitmap(op, values, bitmap, starts);
  return {values.const_data_ptr(),
          bitmap.const_data_ptr<uint8_t>(),
          starts.const_data_ptr<int32_t>(),
          bitmap.size(0),
          bitmap.size(1) * 8,
          dtype_of(op, "values", values)};
}

PackedWeight sparse24_weight(const char* op, const at::Tensor& values, const at::Tensor& indices) {
  check_sparse24(op, values, indices);
  return {values.const_data_ptr(), indices.const_data_ptr<uint8_t>(), nullptr, indices.size(0),
          indices.size(1) * 8,     dtype_of(op, "values", values)};
}

at::Tensor unpack(const PackedWeight& weight, const at::Tensor& values) {
  at::Tensor dense = at::empty({weight.rows, weight.cols}, values.options());
  void* out = dense.data_ptr();
  over_rows(weight.rows, weight.cols,
            [&](int64_t begin, int64_t end) { kernels().packed_unpack(weight, out, begin, end); });
  return dense;
}

// x [tokens, cols] in the layout that the kernel wants, tokens filled up with zeros to `batch`. ATen aligns
// what it allocates to 64 bytes.
at::Tensor laid_out(const at::Tensor& x, int64_t batch, PackedLayout layout, Dtype dtype) {
  const int64_t cols = x.size(1), slab = std::min(batch, kPackedSlab);
  const at::Tensor buffer =
      at::empty({batch * cols}, layout.as_float ? x.options().dtype(at::kFloat) : x.options());
  by_dtype(dtype, [&](auto constant) {
    constexpr Dtype kDtype = decltype(constant)::value;
    const auto* tokens = static_cast<const typename Element<kDtype>::Bits*>(x.const_data_ptr());
    const auto lay = [&](auto* out, auto converted) {
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t j = 0; j < cols; j += layout.unit) {
          const auto* from = tokens + b * cols + j;
          auto* to = out + b / slab * slab * cols + j * slab + b % slab * layout.unit;
          for (int64_t i = 0; i < layout.unit; ++i) to[i] = b < x.size(0) ? converted(from[i]) : 0;
        }
      }
    };
    if (layout.as_float) {
      lay(static_cast<float*>(buffer.data_ptr()), to_float<kDtype>);
    } else {
      lay(static_cast<uint16_t*>(buffer.data_ptr()), [](auto bits) { return bits; });
    }
  });
  return buffer;
}

template <Dtype dtype>
void add_bias(const float* sums, const void* bias, int64_t tokens, int64_t rows, int64_t batch, void* y) {
  using T = typename Element<dtype>::Bits;
  const T* added = static_cast<const T*>(bias);
  for (int64_t b = 0; b < tokens; ++b) {
    for (int64_t row = 0; row < rows; ++row) {
      const float sum = sums[row * batch + b] + (added != nullptr ? to_float<dtype>(added[row]) : 0.0f);
      static_cast<T*>(y)[b * rows + row] = from_float<dtype>(sum);
    }
  }
}

// x [tokens, cols], tokens <= kPackedBatch.
at::Tensor product(const PackedWeight& weight, const at::Tensor& x, const std::optional<at::Tensor>& bias) {
  const int64_t tokens = x.size(0);
  at::Tensor y = at::empty({tokens, weight.rows}, x.options());
  int64_t batch = 1;
  while (batch < tokens) batch = batch < kPackedSlab ? 2 * batch : batch + kPackedSlab;
  const at::Tensor columns = laid_out(x, batch, kernels().packed_layout(weight), weight.dtype);
  const void* laid = columns.const_data_ptr();
  std::vector<float> sums(static_cast<size_t>(weight.rows * batch));
  over_rows(weight.rows, weight.cols, [&](int64_t begin, int64_t end) {
    kernels().packed_product(weight, laid, batch, sums.data(), begin, end);
  });
  const at::Tensor added = bias ? bias->contiguous() : at::Tensor();
  const void* to_add = added.defined() ? added.const_data_ptr() : nullptr;
  by_dtype(weight.dtype, [&](auto dtype) {
    add_bias<decltype(dtype)::value>(sums.data(), to_add, tokens, weight.rows, batch, y.data_ptr());
  });
  return y;
}

at::Tensor linear(const char* op, const PackedWeight& weight, const at::Tensor& values, const at::Tensor& x,
                  const std::optional<at::Tensor>& bias) {
  check_packed_input(op, x, values, weight.cols);
  check_packed_bias(op, bias, values, weight.rows);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.rows;
  const at::Tensor tokens = x.reshape({-1, weight.cols}).contiguous();
  if (tokens.size(0) == 0) return at::empty(shape, x.options());
  if (tokens.size(0) > kPackedBatch) return at::linear(x, unpack(weight, values), bias);
  return product(weight, tokens, bias).view(shape);
}

at::Tensor bitmap_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& bitmap,
                         const at::Tensor& starts, const std::optional<at::Tensor>& bias) {
  return linear("bitmap_linear", bitmap_weight("bitmap_linear", values, bitmap, starts), values, x, bias);
}

at::Tensor sparse24_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                           const std::optional<at::Tensor>& bias) {
  return linear("sparse24_linear", sparse24_weight("sparse24_linear", values, indices), values, x, bias);
}

at::Tensor unpack_bitmap(const at::Tensor& values, const at::Tensor& bitmap, const at::Tensor& starts) {
  return unpack(bitmap_weight("unpack_bitmap", values, bitmap, starts), values);
}

at::Tensor unpack_sparse24(const at::Tensor& values, const at::Tensor& indices) {
  return unpack(sparse24_weight("unpack_sparse24", values, indices), values);
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) {
  m.impl("bitmap_linear", &wanda::cpu::bitmap_linear);
  m.impl("sparse24_linear", &wanda::cpu::sparse24_linear);
  m.impl("unpack_bitmap", &wanda::cpu::unpack_bitmap);
  m.impl("unpack_sparse24", &wanda::cpu::unpack_sparse24);
}

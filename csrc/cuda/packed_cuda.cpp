// Packed sparse weights on CUDA tensors: checks, device, stream, registration.
#include "packed.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>

#include "bindings.h"

namespace wanda::cuda {
namespace {

using Bias = std::optional<at::Tensor>;

constexpr int64_t kBitmapLaunches = 2;  // of kBitmapTokens; more tokens go through the unpacked weight

at::Tensor unpack_bitmap(const at::Tensor& values, const at::Tensor& bitmap, const at::Tensor& starts) {
  check_bitmap("unpack_bitmap", values, bitmap, starts);
  const c10::cuda::CUDAGuard guard(values.device());
  at::Tensor dense = at::empty({bitmap.size(0), bitmap.size(1) * 8}, values.options());
  const at::Tensor words = aligned(bitmap);
  const PackedWeight weight{values.const_data_ptr(),
                            words.const_data_ptr<uint8_t>(),
                            starts.const_data_ptr<int32_t>(),
                            dense.size(0),
                            dense.size(1),
                            dtype_of("unpack_bitmap", "values", values)};
  check_launch("unpack_bitmap",
               launch_unpack_bitmap(weight, dense.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return dense;
}

at::Tensor unpack_sparse24(const at::Tensor& values, const at::Tensor& indices) {
  check_sparse24("unpack_sparse24", values, indices);
  const c10::cuda::CUDAGuard guard(values.device());
  at::Tensor dense = at::empty({indices.size(0), indices.size(1) * 8}, values.options());
  const at::Tensor plain = aligned(values);
  const PackedWeight weight{plain.const_data_ptr(),
                            indices.const_data_ptr<uint8_t>(),
                            nullptr,
                            dense.size(0),
                            dense.size(1),
                            dtype_of("unpack_sparse24", "values", values)};
  check_launch("unpack_sparse24",
               launch_unpack_sparse24(weight, dense.data_ptr(), c10::cuda::getCurrentCUDAStream()));
  return dense;
}

// `launch` in steps of at most `most` tokens.
template <class Launch>
at::Tensor product(const char* op, const PackedWeight& weight, const at::Tensor& x, const Bias& bias,
                   int64_t most, Launch launch) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.rows;
  at::Tensor y = at::empty(shape, x.options());
  const at::Tensor tokens = aligned(x.reshape({-1, weight.cols}));
  const at::Tensor added = bias ? bias->contiguous() : at::Tensor();
  const at::Tensor rows = y.view({-1, weight.rows});
  for (int64_t first = 0; first < tokens.size(0); first += most) {
    const PackedLinearParams params{weight, tokens[first].const_data_ptr(),
                                    added.defined() ? added.const_data_ptr() : nullptr,
                                    rows[first].data_ptr(), std::min(most, tokens.size(0) - first)};
    check_launch(op, launch(params, c10::cuda::getCurrentCUDAStream()));
  }
  return y;
}

int64_t tokens_in(const at::Tensor& x) { return x.numel() / std::max<int64_t>(1, x.size(-1)); }

at::Tensor bitmap_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& bitmap,
                         const at::Tensor& starts, const Bias& bias) {
  check_bitmap("bitmap_linear", values, bitmap, starts);
  check_packed_input("bitmap_linear", x, values, bitmap.size(1) * 8);
  check_packed_bias("bitmap_linear", bias, values, bitmap.size(0));
  const c10::cuda::CUDAGuard guard(values.device());
  if (tokens_in(x) > kBitmapLaunches * kBitmapTokens) {
    return at::linear(x, unpack_bitmap(values, bitmap, starts), bias);
  }
  const at::Tensor words = aligned(bitmap);
  const PackedWeight weight{values.const_data_ptr(),
                            words.const_data_ptr<uint8_t>(),
                            starts.const_data_ptr<int32_t>(),
                            bitmap.size(0),
                            bitmap.size(1) * 8,
                            dtype_of("bitmap_linear", "values", values)};
  return product("bitmap_linear", weight, x, bias, kBitmapTokens, launch_bitmap_linear);
}

// The sparse tensor cores take 16-bit types (float32 there would be tf32, and 1:2).
at::Tensor sparse24_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                           const Bias& bias) {
  check_sparse24("sparse24_linear", values, indices);
  check_packed_input("sparse24_linear", x, values, indices.size(1) * 8);
  check_packed_bias("sparse24_linear", bias, values, indices.size(0));
  const c10::cuda::CUDAGuard guard(values.device());
  const Dtype dtype = dtype_of("sparse24_linear", "values", values);
  if (tokens_in(x) > kSparse24Tokens || dtype == Dtype::kFloat32) {
    return at::linear(x, unpack_sparse24(values, indices), bias);
  }
  const at::Tensor plain = aligned(values), codes = aligned(indices);
  const PackedWeight weight{plain.const_data_ptr(),
                            codes.const_data_ptr<uint8_t>(),
                            nullptr,
                            indices.size(0),
                            indices.size(1) * 8,
                            dtype};
  return product("sparse24_linear", weight, x, bias, kSparse24Tokens, launch_sparse24_linear);
}

}  // namespace
}  // namespace wanda::cuda

TORCH_LIBRARY_IMPL(wanda, CUDA, m) {
  m.impl("bitmap_linear", &wanda::cuda::bitmap_linear);
  m.impl("sparse24_linear", &wanda::cuda::sparse24_linear);
  m.impl("unpack_bitmap", &wanda::cuda::unpack_bitmap);
  m.impl("unpack_sparse24", &wanda::cuda::unpack_sparse24);
}

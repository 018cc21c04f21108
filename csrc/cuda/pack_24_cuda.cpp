// 2:4 packing on CUDA tensors: checks, device, stream, registration.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include <tuple>

#include "bindings.h"
#include "pack_24.h"

namespace wanda::cuda {
namespace {

using Packed = std::tuple<at::Tensor, at::Tensor>;

uint16_t* bits(const at::Tensor& tensor) { return static_cast<uint16_t*>(tensor.data_ptr()); }

at::Tensor aligned_rows(const at::Tensor& weight) {
  const bool fits = has_plain_rows(weight) && is_aligned(weight) && weight.stride(0) % 8 == 0;
  return fits ? weight : aligned(weight);
}

Packed run(const char* op, const at::Tensor& weight, const float* norm, uint32_t* overfull) {
  const int64_t rows = weight.size(0);
  const int64_t cols = weight.size(1);
  const at::Tensor plain = aligned_rows(weight);
  at::Tensor values = at::empty({rows, cols / 2}, weight.options());
  at::Tensor metadata = at::empty({rows, cols / 16}, weight.options().dtype(at::kShort));
  const Pack24Params params{bits(plain),
                            norm,
                            bits(values),
                            bits(metadata),
                            overfull,
                            rows,
                            cols,
                            plain.stride(0),
                            dtype_of(op, "weight", weight)};
  check_launch(op, launch_pack_24(params, c10::cuda::getCurrentCUDAStream()));
  return {values, metadata};
}

// Reads the count of groups that do not fit back to the host, the only synchronisation of these operators; a
// graph that is being captured cannot, and packs without the check.
Packed pack_24(const at::Tensor& weight) {
  check_packable("pack_24", weight);
  const c10::cuda::CUDAGuard guard(weight.device());
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return run("pack_24", weight, nullptr, nullptr);
  }
  const at::Tensor overfull = at::zeros({1}, weight.options().dtype(at::kInt));
  const Packed packed =
      run("pack_24", weight, nullptr, reinterpret_cast<uint32_t*>(overfull.mutable_data_ptr<int>()));
  const int count = overfull.item<int>();
  TORCH_CHECK_VALUE(count == 0, "wanda::pack_24: weight must be 2:4 sparse, ", count,
                    " of its groups of four have more than two non-zeros");
  return packed;
}

Packed prune_pack_24(const at::Tensor& weight, const at::Tensor& norm) {
  check_packable("prune_pack_24", weight);
  check_norm("prune_pack_24", norm, weight);
  const c10::cuda::CUDAGuard guard(weight.device());
  const at::Tensor norms = aligned(norm);
  return run("prune_pack_24", weight, norms.const_data_ptr<float>(), nullptr);
}

at::Tensor unpack_24(const at::Tensor& values, const at::Tensor& metadata) {
  check_packed("unpack_24", values, metadata);
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t rows = values.size(0);
  const int64_t cols = values.size(1) * 2;
  const at::Tensor plain_values = aligned(values);
  const at::Tensor plain_metadata = aligned(metadata);
  at::Tensor weight = at::empty({rows, cols}, values.options());
  const Unpack24Params params{bits(plain_values), bits(plain_metadata), bits(weight), rows, cols};
  check_launch("unpack_24", launch_unpack_24(params, c10::cuda::getCurrentCUDAStream()));
  return weight;
}

}  // namespace
}  // namespace wanda::cuda

TORCH_LIBRARY_IMPL(wanda, CUDA, m) {
  m.impl("pack_24", &wanda::cuda::pack_24);
  m.impl("prune_pack_24", &wanda::cuda::prune_pack_24);
  m.impl("unpack_24", &wanda::cuda::unpack_24);
}

// Launchers of 2:4 packing on CPU tensors: checks, threads, registration.
#include "pack_24.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>

#include "../checks.h"
#include "dispatch.h"

namespace wanda::cpu {
namespace {

using Packed = std::tuple<at::Tensor, at::Tensor>;

uint16_t* bits(const at::Tensor& tensor) { return static_cast<uint16_t*>(tensor.data_ptr()); }

Packed run(const char* op, const at::Tensor& weight, const float* norm) {
  const int64_t rows = weight.size(0);
  const int64_t cols = weight.size(1);
  const at::Tensor plain = with_plain_rows(weight);
  at::Tensor values = at::empty({rows, cols / 2}, weight.options());
  at::Tensor metadata = at::empty({rows, cols / 16}, weight.options().dtype(at::kShort));
  const Pack24Params params{bits(plain), norm, bits(values),    bits(metadata),
                            rows,        cols, plain.stride(0), dtype_of(op, "weight", weight)};
  const auto kernel = WANDA_BY_ISA(pack_24);
  std::atomic<int64_t> overfull{0};
  // Whole blocks of 32 rows: torch's order of the metadata is local to them.
  at::parallel_for(0, rows / 32, grain_rows(32 * cols),
                   [&](int64_t begin, int64_t end) { overfull += kernel(params, 32 * begin, 32 * end); });
  TORCH_CHECK_VALUE(overfull == 0, "wanda::", op, ": weight must be 2:4 sparse, ", overfull.load(),
                    " of its groups of four have more than two non-zeros");
  return {values, metadata};
}

Packed pack(const at::Tensor& weight) {
  check_packable("pack_24", weight);
  return run("pack_24", weight, nullptr);
}

Packed prune_pack(const at::Tensor& weight, const at::Tensor& norm) {
  check_packable("prune_pack_24", weight);
  check_norm("prune_pack_24", norm, weight);
  const at::Tensor norms = norm.contiguous();
  return run("prune_pack_24", weight, norms.const_data_ptr<float>());
}

at::Tensor unpack(const at::Tensor& values, const at::Tensor& metadata) {
  check_packed("unpack_24", values, metadata);
  const int64_t rows = values.size(0);
  const int64_t cols = values.size(1) * 2;
  const at::Tensor plain_values = values.contiguous();
  const at::Tensor plain_metadata = metadata.contiguous();
  at::Tensor weight = at::empty({rows, cols}, values.options());
  const Unpack24Params params{bits(plain_values), bits(plain_metadata), bits(weight), rows, cols};
  at::parallel_for(0, rows, grain_rows(cols),
                   [&](int64_t begin, int64_t end) { unpack_24(params, begin, end); });
  return weight;
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) {
  m.impl("pack_24", &wanda::cpu::pack);
  m.impl("prune_pack_24", &wanda::cpu::prune_pack);
  m.impl("unpack_24", &wanda::cpu::unpack);
}

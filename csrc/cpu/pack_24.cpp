// Launchers of 2:4 packing on CPU tensors: checks, threads, registration.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <tuple>

#include "../checks.h"
#include "launch.h"
#include "pack_24_impl.h"

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
  const Pack24Params params{bits(plain),
                            norm,
                            bits(values),
                            bits(metadata),
                            nullptr,
                            rows,
                            cols,
                            plain.stride(0),
                            dtype_of(op, "weight", weight)};
  std::atomic<int64_t> overfull{0};
  // Whole blocks of 32 rows: torch's order of the metadata is local to them.
  over_rows(rows / 32, 32 * cols,
            [&](int64_t begin, int64_t end) { overfull += kernels().pack_24(params, 32 * begin, 32 * end); });
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

// Rows [begin, end), any instruction set: not on a hot path. Blocks of 32 rows x 32 columns: their metadata
// is 128 contiguous bytes.
void unpack_rows(const Unpack24Params& p, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end;) {
    const int64_t block_end = (first / 32 + 1) * 32;
    const int64_t last = end < block_end ? end : block_end;
    for (int64_t column = 0; column < p.cols / 16; column += 2) {
      for (int64_t row = first; row < last; ++row) {
        for (int64_t c = column; c < column + 2; ++c) {
          const uint32_t metadata = p.metadata[pack_24_position(row, c, p.rows)];
          const uint16_t* values = p.values + row * (p.cols / 2) + c * 8;
          uint16_t* w = p.weight + row * p.cols + c * 16;
          for (int j = 0; j < 16; ++j) w[j] = 0;
          for (int i = 0; i < 8; ++i) w[i / 2 * 4 + (metadata >> (2 * i) & 3)] = values[i];
        }
      }
    }
    first = last;
  }
}

at::Tensor unpack(const at::Tensor& values, const at::Tensor& metadata) {
  check_packed("unpack_24", values, metadata);
  const int64_t rows = values.size(0);
  const int64_t cols = values.size(1) * 2;
  const at::Tensor plain_values = values.contiguous();
  const at::Tensor plain_metadata = metadata.contiguous();
  at::Tensor weight = at::empty({rows, cols}, values.options());
  const Unpack24Params params{bits(plain_values), bits(plain_metadata), bits(weight), rows, cols};
  over_rows(rows, cols, [&](int64_t begin, int64_t end) { unpack_rows(params, begin, end); });
  return weight;
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) {
  m.impl("pack_24", &wanda::cpu::pack);
  m.impl("prune_pack_24", &wanda::cpu::prune_pack);
  m.impl("unpack_24", &wanda::cpu::unpack);
}

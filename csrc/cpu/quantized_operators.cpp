// The operators on packed weights with values of 8 or 4 bits on the CPU. As packed_operators.cpp, but rows of
// x are rounded first.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "../checks_quantized.h"
#include "convert.h"
#include "isa.h"
#include "parallel.h"
#include "products.h"

namespace wanda::cpu {
namespace {

// Rows [begin, end) of a weight; `begin` is even.
QuantizedWeight rows_of(const QuantizedWeight& weight, int64_t begin, int64_t end) {
  QuantizedWeight part = weight;
  const int64_t stored = weight.bits == 8 ? begin : begin / 2;
  part.rows = end - begin;
  part.scales += begin * weight.groups;
  if (weight.codes != nullptr) part.codes += begin * (weight.cols / 8);
  if (weight.starts != nullptr) {
    part.starts += stored;
  } else {
    part.values += stored * (weight.codes != nullptr ? weight.cols / 2 : weight.cols);
  }
  return part;
}

// work(begin, end) over rows; tasks begin at whole groups of rows.
template <class Work>
void over_groups(int64_t rows, int64_t cols, Work work) {
  over_rows((rows + kQuantizedRows - 1) / kQuantizedRows, cols * kQuantizedRows,
            [&](int64_t begin, int64_t end) {
              work(begin * kQuantizedRows, std::min(end * kQuantizedRows, rows));
            });
}

std::vector<char> scratch_of(const QuantizedWeight& weight) {
  return std::vector<char>(static_cast<size_t>(quantized_scratch(weight)));
}

void unpack_into(const QuantizedWeight& weight, const at::Tensor& dense) {
  const Dtype dtype = dtype_of("unpack_quantized", "dense", dense);
  void* const out = dense.data_ptr();
  over_groups(weight.rows, weight.cols, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch = scratch_of(weight);
    kernels().quantized_unpack(weight, out, dtype, begin, end, scratch.data());
  });
}

// y = x W^T + bias by the unpacked weight.
void multiply_unpacked(const QuantizedWeight& weight, const at::Tensor& x, const OptionalTensor& bias,
                       const at::Tensor& y) {
  multiply_in_bands(weight.rows, kQuantizedRows, x, bias, y,
                    [&](int64_t begin, int64_t end, const at::Tensor& dense) {
                      unpack_into(rows_of(weight, begin, end), dense);
                    });
}

// A weight and the rows of x that it is multiplied with, rounded.
struct Group {
  QuantizedWeight weight;
  int64_t first, tokens;  // tokens <= kFewTokens
  QuantizedColumns columns;
  at::Tensor memory;  // of `columns`
};

Group group_of(const QuantizedWeight& weight, int64_t first, int64_t tokens) {
  const int64_t batch = batch_of(tokens, kQuantizedSlab);
  const int64_t planes = weight.bits == 8 ? 2 : 1, together = std::max<int64_t>(weight.group / 64, 1);
  const int64_t parts = (weight.cols / 64 + together - 1) / together;
  const int64_t whole = batch * weight.cols * planes;
  const int64_t starts = batch * parts * planes * kQuantizedLanes * int64_t{sizeof(int32_t)};
  const int64_t scales = batch * weight.groups * int64_t{sizeof(float)};
  Group group{weight, first, tokens, {}, at::empty({whole + starts + scales}, at::kByte)};
  auto* const memory = static_cast<char*>(group.memory.data_ptr());  // ATen aligns to 64 bytes
  group.columns = {reinterpret_cast<int8_t*>(memory), reinterpret_cast<int32_t*>(memory + whole),
                   reinterpret_cast<float*>(memory + whole + starts), batch, std::min(batch, kQuantizedSlab)};
  return group;
}

// y's rows of each group. Every thread takes a share of the outputs and multiplies it with all groups.
// `bias`: [rows of a weight] or nullptr.
template <Dtype dtype>
void multiply(const std::vector<Group>& groups, const at::Tensor& x, const void* bias, const at::Tensor& y) {
  using T = typename Element<dtype>::Bits;
  const int64_t rows = y.size(1), cols = x.size(1), count = static_cast<int64_t>(groups.size());
  const T* const from = static_cast<const T*>(x.const_data_ptr());
  int64_t widest = 0;
  for (const Group& group : groups) {
    const QuantizedColumns& columns = group.columns;
    widest = std::max(widest, columns.batch);
    over_rows(columns.batch / columns.slab, columns.slab * cols, [&](int64_t begin, int64_t end) {
      kernels().quantized_round(group.weight, from + group.first * cols, dtype, group.tokens, columns, begin,
                                end);
    });
  }
  const auto bias_of = [bias](int64_t row) { return bias ? static_cast<const T*>(bias) + row : nullptr; };
  T* const out = static_cast<T*>(y.data_ptr());
  over_groups(rows, cols * count, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(static_cast<size_t>((end - begin) * widest));
    std::vector<char> scratch = scratch_of(groups[0].weight);
    for (const Group& group : groups) {
      const QuantizedWeight part = rows_of(group.weight, begin, end);
      kernels().quantized_product(part, group.columns, sums.data(), 0, part.rows, scratch.data());
      store_sums<dtype>(sums.data(), group.columns.batch, group.tokens, part.rows, bias_of(begin),
                        out + group.first * rows + begin, rows);
    }
  });
}

at::Tensor quantized_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& scales,
                            const OptionalTensor& codes, const OptionalTensor& starts,
                            const OptionalTensor& bias, int64_t bits) {
  const char* const op = "quantized_linear";
  const QuantizedWeight weight = check_quantized(op, values, scales, codes, starts, bits);
  check_quantized_x(op, weight, values, x);
  check_quantized_bias(op, weight, x, bias);
  const at::Tensor tokens = x.reshape({-1, weight.cols}).contiguous();
  const int64_t count = tokens.size(0);
  at::Tensor y = at::empty({count, weight.rows}, x.options());
  if (count > kFewTokens) {
    multiply_unpacked(weight, tokens, bias, y);
  } else if (count > 0) {
    const at::Tensor added = bias ? bias->contiguous() : at::Tensor();
    by_dtype(dtype_of(op, "x", x), [&](auto dtype) {
      multiply<decltype(dtype)::value>({group_of(weight, 0, count)}, tokens,
                                       added.defined() ? added.const_data_ptr() : nullptr, y);
    });
  }
  return y.view(shape_of(x, weight.rows));
}

at::Tensor quantized_experts(const at::Tensor& x, const at::Tensor& values, const at::Tensor& scales,
                             const at::Tensor& ends, const OptionalTensor& codes,
                             const OptionalTensor& starts, int64_t bits) {
  const char* const op = "quantized_experts";
  const QuantizedWeight stack = check_quantized(op, values, scales, codes, starts, bits);
  const int64_t rows = check_quantized_experts(op, stack, values, x, ends);
  check_ends(op, ends, x.size(0));
  const at::Tensor tokens = x.contiguous();
  at::Tensor y = at::empty({x.size(0), rows}, x.options());
  std::vector<Group> groups;
  const auto of_expert = [&](int64_t expert) { return rows_of(stack, expert * rows, (expert + 1) * rows); };
  const int64_t last = over_experts(
      ends,
      [&](int64_t expert, int64_t first, int64_t count) {
        groups.push_back(group_of(of_expert(expert), first, count));
      },
      [&](int64_t expert, int64_t first, int64_t count) {
        multiply_unpacked(of_expert(expert), tokens.narrow(0, first, count), {}, y.narrow(0, first, count));
      });
  y.narrow(0, last, x.size(0) - last).zero_();
  if (groups.empty()) return y;
  by_dtype(dtype_of(op, "x", x),
           [&](auto dtype) { multiply<decltype(dtype)::value>(groups, tokens, nullptr, y); });
  return y;
}

at::Tensor unpack_quantized(const at::Tensor& values, const at::Tensor& scales, const OptionalTensor& codes,
                            const OptionalTensor& starts, int64_t bits, at::ScalarType dtype) {
  const char* const op = "unpack_quantized";
  const QuantizedWeight weight = check_quantized(op, values, scales, codes, starts, bits);
  WANDA_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "dtype must be float32, bfloat16 or float16, got ", dtype);
  const at::Tensor dense = at::empty({weight.rows, weight.cols}, values.options().dtype(dtype));
  unpack_into(weight, dense);
  return dense;
}

// ---- Weights to levels, and what is kept of them to bytes.

std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& weight, int64_t bits, int64_t group,
                                            const OptionalTensor& importance) {
  const char* const op = "quantize";
  const Quantization all = check_quantize(op, weight, bits, group, importance);
  std::atomic<int64_t> not_finite{0};
  over_rows(all.params.rows, all.params.cols, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(quantize_scratch(all.params)));
    not_finite += kernels().quantize(all.params, begin, end, scratch.data());
  });
  WANDA_CHECK_VALUE(not_finite == 0, "weight holds NaN or inf: it cannot be quantised");
  return {all.levels, all.scales};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> exact_levels(const at::Tensor& weight, int64_t bits,
                                                            int64_t group) {
  const Quantization all = check_quantize("exact_levels", weight, bits, group, {});
  std::atomic<bool> are_exact{true};
  over_rows(all.params.rows, all.params.cols, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(quantize_scratch(all.params)));
    for (int64_t row = begin; row < end && are_exact; ++row) {
      if (!kernels().exact_levels(all.params, row, row + 1, scratch.data())) are_exact = false;
    }
  });
  return {all.levels, all.scales, at::full({}, are_exact.load(), weight.options().dtype(at::kBool))};
}

// The kept levels of a row, as they are stored, to `to`, which has room for one more. Without a branch: of
// a mask at random it is mispredicted at every other column. Returns how many there are.
int64_t gather_kept(const int8_t* levels, const bool* mask, int64_t cols, int8_t offset, uint8_t* to) {
  int64_t count = 0;
  for (int64_t i = 0; i < cols; ++i) {
    to[count] = static_cast<uint8_t>(levels[i] + offset);
    count += mask[i];
  }
  return count;
}

void pack_kept_(at::Tensor values, const at::Tensor& levels, const at::Tensor& mask, const at::Tensor& starts,
                int64_t bits) {
  const char* const op = "pack_kept_";
  check_pack_kept(op, values, levels, mask, starts, bits);
  const int64_t rows = levels.size(0), cols = levels.size(1), stored = starts.size(0) - 1;
  const int64_t together = bits == 8 ? 1 : 2;  // rows that share bytes
  const int8_t* const from = levels.const_data_ptr<int8_t>();
  const bool* const kept = mask.const_data_ptr<bool>();
  const int32_t* const start = starts.const_data_ptr<int32_t>();
  uint8_t* const to = values.mutable_data_ptr<uint8_t>();
  std::atomic<int64_t> uneven{0};
  over_rows(stored, together * cols, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> buffer(static_cast<size_t>(2 * (cols + 1)));
    uint8_t *low = buffer.data(), *high = low + cols + 1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = together * i;
      const bool is_pair = together == 2 && row + 1 < rows;
      const auto offset = static_cast<int8_t>(1 << (bits - 1));
      const int64_t count = gather_kept(from + row * cols, kept + row * cols, cols, offset, low);
      const int64_t others =
          is_pair ? gather_kept(from + (row + 1) * cols, kept + (row + 1) * cols, cols, offset, high) : 0;
      const int64_t bytes = std::max(count, others);
      if (start[i] < 0 || start[i + 1] > values.size(0) || start[i + 1] != start[i] + bytes) {
        ++uneven;
        continue;
      }
      std::fill(low + count, low + bytes, 0);
      std::fill(high + others, high + bytes, 0);
      for (int64_t k = 0; k < bytes; ++k) to[start[i] + k] = static_cast<uint8_t>(low[k] | high[k] << 4);
    }
  });
  check_kept(op, uneven);
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) {
  m.impl("quantized_linear", &wanda::cpu::quantized_linear);
  m.impl("quantized_experts", &wanda::cpu::quantized_experts);
  m.impl("unpack_quantized", &wanda::cpu::unpack_quantized);
  m.impl("quantize", &wanda::cpu::quantize);
  m.impl("exact_levels", &wanda::cpu::exact_levels);
  m.impl("pack_kept_", &wanda::cpu::pack_kept_);
}

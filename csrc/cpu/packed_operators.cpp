// The operators on packed weights on the CPU: products with one weight, dense ones too, or with each expert's
// of a stack, and unpacking.
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "convert.h"
#include "isa.h"
#include "parallel.h"
#include "products.h"

namespace wanda::cpu {
namespace {

// Rows [begin, end) of a weight.
PackedWeight rows_of(const PackedWeight& weight, int64_t begin, int64_t end) {
  PackedWeight part = weight;
  part.rows = end - begin;
  if (weight.codes != nullptr) part.codes += begin * (weight.cols / 8);
  if (weight.starts != nullptr) {
    part.starts += begin;
  } else {
    const int64_t bytes = weight.dtype == Dtype::kFloat32 ? 4 : 2;
    const int64_t kept = weight.codes != nullptr ? weight.cols / 2 : weight.cols;  // of a row
    part.values = static_cast<const char*>(weight.values) + begin * kept * bytes;
  }
  return part;
}

void unpack_into(const PackedWeight& weight, void* dense) {
  over_rows(weight.rows, weight.cols,
            [&](int64_t begin, int64_t end) { kernels().packed_unpack(weight, dense, begin, end); });
}

at::Tensor unpack_dense(const PackedWeight& weight, const at::Tensor& values) {
  const at::Tensor dense = at::empty({weight.rows, weight.cols}, values.options());
  unpack_into(weight, dense.data_ptr());
  return dense;
}

// y = x W^T + bias by the unpacked weight.
void multiply_unpacked(const PackedWeight& weight, const at::Tensor& x, const OptionalTensor& bias,
                       const at::Tensor& y) {
  multiply_in_bands(weight.rows, 1, x, bias, y, [&](int64_t begin, int64_t end, const at::Tensor& dense) {
    unpack_into(rows_of(weight, begin, end), dense.data_ptr());
  });
}

// A weight and the rows of x that it is multiplied with.
struct Group {
  PackedWeight weight;
  int64_t first, tokens;  // tokens <= kFewTokens
  int64_t batch;          // tokens, filled up to what kernels take
  int64_t columns;        // where its rows lie in what is laid out
};

// The rows of x that a group takes, in the layout that the kernel wants, filled up with zeros to its batch
// and columns.
template <class From, class To, class Convert>
void lay_out(const From* x, const Group& group, int64_t unit, To* out, Convert converted) {
  const int64_t cols = group.weight.cols, filled = packed_columns(group.weight);
  const int64_t slab = std::min(group.batch, kPackedSlab);
  for (int64_t b = 0; b < group.batch; ++b) {
    for (int64_t j = 0; j < filled; j += unit) {
      const From* from = x + (group.first + b) * cols + j;
      To* to = out + group.columns + b / slab * slab * filled + j * slab + b % slab * unit;
      const int64_t there = b < group.tokens ? std::clamp<int64_t>(cols - j, 0, unit) : 0;
      for (int64_t i = 0; i < there; ++i) to[i] = converted(from[i]);
      std::fill(to + there, to + unit, 0);
    }
  }
}

// All groups' rows of x. ATen aligns what it allocates to 64 bytes; there are a multiple of 64 columns.
template <Dtype dtype>
at::Tensor laid_out(const at::Tensor& x, const std::vector<Group>& groups, int64_t size) {
  const PackedLayout layout = kernels().packed_layout(groups[0].weight);
  const at::Tensor buffer = at::empty({size}, layout.as_float ? x.options().dtype(at::kFloat) : x.options());
  const auto* from = static_cast<const typename Element<dtype>::Bits*>(x.const_data_ptr());
  void* const to = buffer.data_ptr();
  over_rows(static_cast<int64_t>(groups.size()), x.size(1), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const Group& group = groups[static_cast<size_t>(g)];
      if (layout.as_float) {
        lay_out(from, group, layout.unit, static_cast<float*>(to),
                [](auto bits) { return to_float<dtype>(bits); });
      } else {
        lay_out(from, group, layout.unit, static_cast<uint16_t*>(to), [](auto bits) { return bits; });
      }
    }
  });
  return buffer;
}

// y's rows of each group. Every thread takes a share of the outputs and multiplies it with all groups:
// whatever their tokens, threads have as much to do. `bias`: [rows of a weight] or nullptr.
template <Dtype dtype>
void multiply(const std::vector<Group>& groups, const at::Tensor& x, const void* bias, at::Tensor& y) {
  using T = typename Element<dtype>::Bits;
  int64_t batches = 0, widest = 0;
  for (const Group& group : groups) {
    batches += group.batch;
    widest = std::max(widest, group.batch);
  }
  const int64_t rows = y.size(1), cols = x.size(1);
  const at::Tensor columns = laid_out<dtype>(x, groups, batches * packed_columns(groups[0].weight));
  const auto* laid = static_cast<const char*>(columns.const_data_ptr());
  const int64_t element = columns.element_size();
  const auto bias_of = [bias](int64_t row) { return bias ? static_cast<const T*>(bias) + row : nullptr; };
  T* const out = static_cast<T*>(y.data_ptr());
  over_rows(rows, cols * static_cast<int64_t>(groups.size()), [&](int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    std::vector<float> sums(static_cast<size_t>(count * widest));
    for (const Group& group : groups) {
      const PackedWeight part = rows_of(group.weight, begin, end);
      kernels().packed_product(part, laid + group.columns * element, group.batch, sums.data(), 0, count);
      store_sums<dtype>(sums.data(), group.batch, group.tokens, count, bias_of(begin),
                        out + group.first * rows + begin, rows);
    }
  });
}

// ---- One weight.

// At most kFewTokens rows of x.
at::Tensor linear_of_few(const PackedWeight& weight, const at::Tensor& x, const OptionalTensor& bias) {
  const std::vector<int64_t> shape = shape_of(x, weight.rows);
  const at::Tensor tokens = x.reshape({-1, weight.cols}).contiguous();
  const int64_t count = tokens.size(0);
  if (count == 0) return at::empty(shape, x.options());
  const at::Tensor added = bias ? bias->contiguous() : at::Tensor();
  at::Tensor y = at::empty({count, weight.rows}, x.options());
  by_dtype(weight.dtype, [&](auto dtype) {
    multiply<decltype(dtype)::value>({{weight, 0, count, batch_of(count, kPackedSlab), 0}}, tokens,
                                     added.defined() ? added.const_data_ptr() : nullptr, y);
  });
  return y.view(shape);
}

at::Tensor linear(const char* op, const PackedWeight& weight, const at::Tensor& values, const at::Tensor& x,
                  const OptionalTensor& bias) {
  check_packed_linear(op, weight, values, x, bias);
  if (x.numel() <= kFewTokens * weight.cols) return linear_of_few(weight, x, bias);
  const at::Tensor tokens = x.reshape({-1, weight.cols});
  const at::Tensor y = at::empty({tokens.size(0), weight.rows}, x.options());
  multiply_unpacked(weight, tokens, bias, y);
  return y.view(shape_of(x, weight.rows));
}

at::Tensor dense_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  const PackedWeight dense = check_dense_linear("dense_linear", x, weight, bias);
  if (x.numel() > kFewTokens * dense.cols || dense.cols == 0) return at::linear(x, weight, bias);
  return linear_of_few(dense, x, bias);
}

at::Tensor bitmap_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& bitmap,
                         const at::Tensor& starts, const OptionalTensor& bias) {
  return linear("bitmap_linear", check_bitmap("bitmap_linear", values, bitmap, starts), values, x, bias);
}

at::Tensor sparse24_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                           const OptionalTensor& bias) {
  return linear("sparse24_linear", check_sparse24("sparse24_linear", values, indices), values, x, bias);
}

at::Tensor unpack_bitmap(const at::Tensor& values, const at::Tensor& bitmap, const at::Tensor& starts) {
  return unpack_dense(check_bitmap("unpack_bitmap", values, bitmap, starts), values);
}

at::Tensor unpack_sparse24(const at::Tensor& values, const at::Tensor& indices) {
  return unpack_dense(check_sparse24("unpack_sparse24", values, indices), values);
}

// ---- A stack of experts' weights.

at::Tensor experts(const char* op, const PackedWeight& stack, const at::Tensor& values, const at::Tensor& x,
                   const at::Tensor& ends) {
  const int64_t rows = check_experts(op, stack, values, x, ends);
  check_ends(op, ends, x.size(0));
  const at::Tensor tokens = x.contiguous();
  at::Tensor y = at::empty({x.size(0), rows}, x.options());
  std::vector<Group> groups;
  int64_t columns = 0;
  const auto of_expert = [&](int64_t expert) { return rows_of(stack, expert * rows, (expert + 1) * rows); };
  const int64_t last = over_experts(
      ends,
      [&](int64_t expert, int64_t first, int64_t count) {
        groups.push_back({of_expert(expert), first, count, batch_of(count, kPackedSlab), columns});
        columns += groups.back().batch * stack.cols;
      },
      [&](int64_t expert, int64_t first, int64_t count) {
        multiply_unpacked(of_expert(expert), tokens.narrow(0, first, count), {}, y.narrow(0, first, count));
      });
  y.narrow(0, last, x.size(0) - last).zero_();
  if (groups.empty()) return y;
  by_dtype(stack.dtype, [&](auto dtype) { multiply<decltype(dtype)::value>(groups, tokens, nullptr, y); });
  return y;
}

at::Tensor bitmap_experts(const at::Tensor& x, const at::Tensor& values, const at::Tensor& bitmap,
                          const at::Tensor& starts, const at::Tensor& ends) {
  return experts("bitmap_experts", check_bitmap("bitmap_experts", values, bitmap, starts), values, x, ends);
}

at::Tensor sparse24_experts(const at::Tensor& x, const at::Tensor& values, const at::Tensor& indices,
                            const at::Tensor& ends) {
  return experts("sparse24_experts", check_sparse24("sparse24_experts", values, indices), values, x, ends);
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) {
  m.impl("bitmap_linear", &wanda::cpu::bitmap_linear);
  m.impl("sparse24_linear", &wanda::cpu::sparse24_linear);
  m.impl("dense_linear", &wanda::cpu::dense_linear);
  m.impl("unpack_bitmap", &wanda::cpu::unpack_bitmap);
  m.impl("unpack_sparse24", &wanda::cpu::unpack_sparse24);
  m.impl("bitmap_experts", &wanda::cpu::bitmap_experts);
  m.impl("sparse24_experts", &wanda::cpu::sparse24_experts);
}

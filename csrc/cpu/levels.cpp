// calibrate_levels_ on CPU tensors: tiles of rows on one thread each, as solve.cpp has them, and for its
// reasons. In a tile torch's products take turns with own loops over a block of columns (levels_impl.h). A
// block's slopes are one product with all columns, made when its turn comes; the reference keeps those of all
// columns up to date, which reads and writes them once for each block. The error takes half of a product.
//
// Three passes, and the errors of two sets of levels, one thread: 24 ms on 576 x 576, 0.42 x the ten steps of
// solve_rows_; 0.32 x at 1,536 columns. The same in PyTorch: 2.4 x. Blocks of 128 columns take as long.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks_refine.h"
#include "isa.h"
#include "parallel.h"

namespace wanda::cpu {
namespace {

struct Layer {
  at::Tensor gram, extra, per_square;  // [C_in, C_in]; [C_in, 1]: damping * the diagonal, 1 / both together
  int64_t group, bits, passes;
};

// [count, n] of any type -> [n, kLevelsRows], float32: a column lies together.
at::Tensor transposed(const at::Tensor& rows) {
  const at::Tensor tile = at::zeros({kLevelsRows, rows.size(1)}, rows.options().dtype(at::kFloat));
  tile.narrow(0, 0, rows.size(0)).copy_(rows);
  return tile.t().contiguous();
}

// 0 where there is none in float32: of 0, and of denormals.
at::Tensor inverse_of(const at::Tensor& x) {
  const at::Tensor found = x.reciprocal();
  return at::where(found.isfinite(), found, 0);
}

// d @ G @ d of each row, [kLevelsRows] float64. A block with the columns before it counts twice for both:
// half of the product.
at::Tensor errors_of(const at::Tensor& difference, const Layer& layer) {
  at::Tensor errors = at::zeros({kLevelsRows}, difference.options().dtype(at::kDouble));
  const int64_t cols = difference.size(0);
  for (int64_t begin = 0; begin < cols; begin += kLevelsColumns) {
    const int64_t count = std::min(kLevelsColumns, cols - begin);
    const at::Tensor own = difference.narrow(0, begin, count), gram = layer.gram.narrow(0, begin, count);
    at::Tensor slope =
        at::addcmul(at::mm(gram.narrow(1, begin, count), own), own, layer.extra.narrow(0, begin, count));
    if (begin > 0) slope.addmm_(gram.narrow(1, 0, begin), difference.narrow(0, 0, begin), 1, 2);
    errors.add_(own.to(at::kDouble).mul_(slope).sum(0));
  }
  return errors;
}

// Returns each row's error with the levels that it leaves.
at::Tensor calibrate_tile(const at::Tensor& levels, const at::Tensor& weight, const at::Tensor& scales,
                          const Layer& layer) {
  const at::Tensor target = transposed(weight), found = transposed(levels), steps = transposed(scales);
  const at::Tensor per_step = inverse_of(steps);
  const int64_t cols = target.size(0);
  at::Tensor difference = steps.repeat_interleave(layer.group, 0).narrow(0, 0, cols).mul(found).sub_(target);
  at::Tensor slopes = at::empty({kLevelsColumns, kLevelsRows}, target.options());
  for (int64_t pass = 0; pass < layer.passes; ++pass) {
    for (int64_t begin = 0; begin < cols; begin += kLevelsColumns) {
      const int64_t count = std::min(kLevelsColumns, cols - begin);
      at::Tensor slope = slopes.narrow(0, 0, count);
      at::mm_out(slope, layer.gram.narrow(0, begin, count), difference);
      LevelsBlock block{};
      block.gram = layer.gram.const_data_ptr<float>() + begin * cols + begin;
      block.gram_stride = cols;
      block.extra = layer.extra.const_data_ptr<float>() + begin;
      block.per_square = layer.per_square.const_data_ptr<float>() + begin;
      block.steps = steps.const_data_ptr<float>();
      block.per_step = per_step.const_data_ptr<float>();
      block.target = target.const_data_ptr<float>() + begin * kLevelsRows;
      block.slope = slope.mutable_data_ptr<float>();
      block.levels = found.mutable_data_ptr<float>() + begin * kLevelsRows;
      block.difference = difference.mutable_data_ptr<float>() + begin * kLevelsRows;
      block.first = begin;
      block.cols = count;
      block.group = layer.group;
      block.most = static_cast<float>(int64_t{1} << (layer.bits - 1));
      kernels().levels(block);
    }
  }
  if (layer.passes > 0) levels.copy_(found.t().contiguous().narrow(0, 0, levels.size(0)));
  return errors_of(difference, layer);
}

void calibrate_levels_(at::Tensor levels, const at::Tensor& weight, const at::Tensor& scales,
                       const at::Tensor& gram, int64_t bits, double damping, int64_t passes,
                       const OptionalTensor& errors) {
  const int64_t group =
      check_levels("calibrate_levels_", levels, weight, scales, gram, bits, damping, passes, errors);
  const at::Tensor diagonal = gram.diagonal().unsqueeze(1);
  const Layer layer{
      gram.contiguous(), diagonal * damping, inverse_of(diagonal * (1 + damping)), group, bits, passes};
  over_tiles(weight.size(0), kLevelsRows, [&](int64_t row, int64_t count) {
    const auto tile = [&](const at::Tensor& whole) { return whole.narrow(0, row, count); };
    const at::Tensor found = calibrate_tile(tile(levels), tile(weight), tile(scales), layer);
    if (errors) tile(*errors).copy_(found.narrow(0, 0, count));
  });
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) { m.impl("calibrate_levels_", &wanda::cpu::calibrate_levels_); }

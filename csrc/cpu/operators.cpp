// The operators on CPU tensors: how the kernels' work is split over threads, what is around it, registration.
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../checks_refine.h"
#include "convert.h"
#include "isa.h"
#include "parallel.h"

namespace wanda::cpu {
namespace {

// work(sequence, first column, last column + 1): by sequences, or by columns where there are few or where all
// add to one row. Threads part a row at cache lines.
template <class Work>
void over_sequences(int64_t sequences, int64_t cols, bool is_shared, Work work) {
  constexpr int64_t kColumnStep = 64;
  if (!is_shared && sequences >= at::get_num_threads()) {
    at::parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t sequence = begin; sequence < end; ++sequence) work(sequence, int64_t{0}, cols);
    });
    return;
  }
  at::parallel_for(0, (cols + kColumnStep - 1) / kColumnStep, 1, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(last * kColumnStep, cols);
    for (int64_t sequence = 0; sequence < sequences; ++sequence) work(sequence, first * kColumnStep, end);
  });
}

// As over_sequences, for segments of uneven sizes: threads get equal shares of rows times blocks of columns.
// What a segment costs beside its rows counts as kSegmentRows more. A block of a segment goes to the thread
// in whose share it begins.
template <class Work>
void over_segments(const SqnormParams& params, Work work) {
  constexpr int64_t kSegmentRows = 8, kColumnStep = 64;
  const int64_t blocks = (params.cols + kColumnStep - 1) / kColumnStep;
  const auto cost_before = [&](int64_t segment) {
    return segment == 0 ? 0 : params.ends[segment - 1] + segment * kSegmentRows;
  };
  const auto share = [&](int64_t begin, int64_t end) {
    for (int64_t segment = 0; segment < params.sequences; ++segment) {
      const int64_t before = cost_before(segment), cost = cost_before(segment + 1) - before;
      const auto first_block = [&](int64_t place) {  // that begins at `place` or behind it
        return std::clamp<int64_t>((place - before * blocks + cost - 1) / cost, 0, blocks);
      };
      const int64_t first = first_block(begin) * kColumnStep;
      const int64_t last = std::min(first_block(end) * kColumnStep, params.cols);
      if (first < last && cost > kSegmentRows) work(segment, first, last);
    }
  };
  at::parallel_for(0, cost_before(params.sequences) * blocks, 32768 / kColumnStep, share);
}

// ---- rows, N:M.

// A kernel takes rows of one matrix at a time, which share their norms.
template <class Params>
at::Tensor select(const Selection<Params>& selection, void (*kernel)(const Params&, int64_t, int64_t)) {
  return selection.run([&](const Params& params) {
    over_rows(params.rows, params.cols, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t matrix = begin / params.norm_rows,
                      last = std::min(end, (matrix + 1) * params.norm_rows);
        Params part = params;
        part.norm += matrix * params.cols;
        kernel(part, begin, last);
        begin = last;
      }
    });
  });
}

void prune_rows_(at::Tensor weight, const at::Tensor& norm, double sparsity,
                 const OptionalTensor& score_sums) {
  select(check_rows("prune_rows_", weight, norm, sparsity, false, score_sums), kernels().rows);
}

at::Tensor row_mask(const at::Tensor& weight, const at::Tensor& norm, double sparsity) {
  return select(check_rows("row_mask", weight, norm, sparsity, true), kernels().rows);
}

void prune_nm_(at::Tensor weight, const at::Tensor& norm, int64_t n, int64_t m,
               const OptionalTensor& score_sums) {
  select(check_nm("prune_nm_", weight, norm, n, m, false, score_sums), kernels().nm);
}

at::Tensor nm_mask(const at::Tensor& weight, const at::Tensor& norm, int64_t n, int64_t m) {
  return select(check_nm("nm_mask", weight, norm, n, m, true), kernels().nm);
}

// ---- Gram matrices.

// Threads take tiles of the lower triangle: BLAS, called inside of a parallel region, takes no threads of its
// own.
void add_gram_(at::Tensor gram, const at::Tensor& x, double beta, double alpha, int64_t first) {
  check_gram("add_gram_", gram, x, first);
  const at::Tensor tokens = x.to(at::kFloat).contiguous();
  // Large ones are the faster ones (4,096 columns: 1.1 x), as long as what is above the diagonal is little.
  const int64_t step = x.size(1) < 2048 ? kGramStep / 2 : kGramStep;
  std::vector<std::pair<int64_t, int64_t>> tiles;
  for (int64_t row = 0; row < gram.size(0); row += step) {
    for (int64_t column = 0; column <= first + row; column += step) tiles.emplace_back(row, column);
  }
  at::parallel_for(0, static_cast<int64_t>(tiles.size()), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView
        below;  // the thread does not know what its caller has switched off
    for (int64_t i = begin; i < end; ++i) {
      const auto [row, column] = tiles[static_cast<size_t>(i)];
      const int64_t rows = std::min(step, gram.size(0) - row);
      const int64_t cols = std::min(step, gram.size(1) - column);
      gram.narrow(0, row, rows)
          .narrow(1, column, cols)
          .addmm_(tokens.narrow(1, first + row, rows).t(), tokens.narrow(1, column, cols), beta, alpha);
    }
  });
}

// ---- Swaps.

// Threads take blocks of rows, which share what they read of the Gram matrix.
at::Tensor refine(const Refinement& refinement) {
  constexpr int64_t kBlock = 24;
  const RefineParams& params = refinement.params;
  if (params.rows == 0) return refinement.swaps;
  at::parallel_for(0, (params.rows + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    kernels().refine(params, begin * kBlock, std::min(end * kBlock, params.rows));
  });
  return refinement.swaps;
}

at::Tensor refine_rows_(at::Tensor mask, const at::Tensor& weight, const at::Tensor& gram, double damping,
                        std::optional<int64_t> most_swaps, const OptionalTensor& sums) {
  return refine(check_refine_rows("refine_rows_", mask, weight, gram, damping, most_swaps, sums));
}

at::Tensor refine_nm_(at::Tensor mask, const at::Tensor& weight, const at::Tensor& gram, int64_t n, int64_t m,
                      double damping, int64_t sweeps, const OptionalTensor& sums) {
  const Refinement refinement =
      check_refine_nm("refine_nm_", mask, weight, gram, n, m, damping, sweeps, sums);
  int64_t uneven = 0;
  const bool* group = refinement.params.mask;
  for (const bool* const end = group + mask.numel(); group < end; group += m) {
    uneven += std::count(group, group + m, true) != m - n;
  }
  check_groups("refine_nm_", uneven, n, m);
  return refine(refinement);
}

// ---- Column sums of squares.

void add_sqnorm_(at::Tensor sqnorm, const at::Tensor& x, const OptionalTensor& token_mask,
                 const OptionalTensor& ends) {
  const SqnormArguments arguments = check_add_sqnorm("add_sqnorm_", sqnorm, x, token_mask, ends);
  if (ends) check_ends("add_sqnorm_", *ends, x.size(0));
  const SqnormParams& params = arguments.params;
  const auto work = [&](auto... range) { kernels().sqnorm(params, range...); };
  if (params.ends != nullptr) {
    over_segments(params, work);
  } else {
    over_sequences(params.sequences, params.cols, params.is_shared, work);
  }
}

// ---- What makes the inputs of linear layers, with the column sums of squares of what it makes.

void run(const ProductSqnormParams& params, int64_t sequences) {
  over_sequences(sequences, params.cols, params.sqnorm_stride == 0,
                 [&](auto... range) { kernels().product_sqnorm(params, range...); });
}

// The variance is ATen's, in float32, and the products round where transformers rounds: the same bits.
at::Tensor rms_norm_sqnorm(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor sqnorm,
                           const OptionalTensor& token_mask, bool unit_offset) {
  const SqnormShape shape = check_rms_norm_sqnorm("rms_norm_sqnorm", x, weight, sqnorm, token_mask);
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  const at::Tensor scale =
      at::rsqrt(at::add(at::mean(at::pow(x.to(at::kFloat), 2), {-1}, true), eps)).contiguous();
  const at::Tensor inputs = tokens_of(x, shape), weights = weight.contiguous();
  const at::Tensor mask = token_mask ? token_mask->contiguous() : at::Tensor();
  run({unit_offset ? Product::kUnitOffset : Product::kScaleThenWeight, dtype_of("rms_norm_sqnorm", "x", x),
       inputs.const_data_ptr(), inputs.stride(0), inputs.stride(1), weights.const_data_ptr(), 0, 0,
       scale.const_data_ptr<float>(), y.data_ptr(), sqnorm.mutable_data_ptr<float>(),
       sqnorm.dim() == 1 ? 0 : shape.cols, mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
       shape.tokens, shape.cols},
      shape.sequences);
  return y;
}

// The activation is ATen's: the same bits.
at::Tensor act_mul(const char* op, const at::Tensor& activated, const at::Tensor& up, at::Tensor sqnorm,
                   const OptionalTensor& token_mask, const SqnormShape& shape) {
  at::Tensor y = at::empty(up.sizes(), up.options());
  if (y.numel() == 0) return y;
  const at::Tensor first = tokens_of(activated, shape), second = tokens_of(up, shape);
  const at::Tensor mask = token_mask ? token_mask->contiguous() : at::Tensor();
  run({Product::kMultiply, dtype_of(op, "up", up), first.const_data_ptr(), first.stride(0), first.stride(1),
       second.const_data_ptr(), second.stride(0), second.stride(1), nullptr, y.data_ptr(),
       sqnorm.mutable_data_ptr<float>(), sqnorm.dim() == 1 ? 0 : shape.cols,
       mask.defined() ? mask.const_data_ptr<bool>() : nullptr, shape.tokens, shape.cols},
      shape.sequences);
  return y;
}

at::Tensor silu_mul_sqnorm(const at::Tensor& gate, const at::Tensor& up, at::Tensor sqnorm,
                           const OptionalTensor& token_mask) {
  const SqnormShape shape = check_act_mul_sqnorm("silu_mul_sqnorm", gate, up, sqnorm, token_mask);
  return act_mul("silu_mul_sqnorm", at::silu(gate), up, sqnorm, token_mask, shape);
}

at::Tensor gelu_tanh_mul_sqnorm(const at::Tensor& gate, const at::Tensor& up, at::Tensor sqnorm,
                                const OptionalTensor& token_mask) {
  const SqnormShape shape = check_act_mul_sqnorm("gelu_tanh_mul_sqnorm", gate, up, sqnorm, token_mask);
  return act_mul("gelu_tanh_mul_sqnorm", at::gelu(gate, "tanh"), up, sqnorm, token_mask, shape);
}

// ---- 2:4 packing.

std::tuple<at::Tensor, at::Tensor> pack(const char* op, const at::Tensor& weight, const at::Tensor* norm) {
  check_pack_24(op, weight, norm);
  const at::Tensor plain = has_plain_rows(weight.unsqueeze(0)) ? weight : weight.contiguous(),
                   norms = norm != nullptr ? norm->contiguous() : at::Tensor();
  at::Tensor values, metadata;
  const Pack24Params params = pack_24_params(plain, norms, values, metadata);
  std::atomic<int64_t> overfull{0};
  // Whole blocks of 32 rows: torch's order of the metadata is local to them.
  over_rows(params.rows / 32, 32 * params.cols,
            [&](int64_t begin, int64_t end) { overfull += kernels().pack_24(params, 32 * begin, 32 * end); });
  check_overfull(op, overfull);
  return {values, metadata};
}

std::tuple<at::Tensor, at::Tensor> pack_24(const at::Tensor& weight) {
  return pack("pack_24", weight, nullptr);
}

std::tuple<at::Tensor, at::Tensor> prune_pack_24(const at::Tensor& weight, const at::Tensor& norm) {
  return pack("prune_pack_24", weight, &norm);
}

// Rows [begin, end), any instruction set: not on a hot path. Blocks of 32 rows x 32 columns: their metadata
// is 128 contiguous bytes.
void unpack_24_rows(const Unpack24Params& p, int64_t begin, int64_t end) {
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

at::Tensor unpack_24(const at::Tensor& values, const at::Tensor& metadata) {
  check_unpack_24("unpack_24", values, metadata);
  const at::Tensor plain_values = values.contiguous(), plain_metadata = metadata.contiguous();
  at::Tensor weight;
  const Unpack24Params params = unpack_24_params(plain_values, plain_metadata, weight);
  over_rows(params.rows, params.cols,
            [&](int64_t begin, int64_t end) { unpack_24_rows(params, begin, end); });
  return weight;
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) {
  m.impl("prune_rows_", &wanda::cpu::prune_rows_);
  m.impl("row_mask", &wanda::cpu::row_mask);
  m.impl("prune_nm_", &wanda::cpu::prune_nm_);
  m.impl("nm_mask", &wanda::cpu::nm_mask);
  m.impl("refine_rows_", &wanda::cpu::refine_rows_);
  m.impl("refine_nm_", &wanda::cpu::refine_nm_);
  m.impl("add_gram_", &wanda::cpu::add_gram_);
  m.impl("add_sqnorm_", &wanda::cpu::add_sqnorm_);
  m.impl("rms_norm_sqnorm", &wanda::cpu::rms_norm_sqnorm);
  m.impl("silu_mul_sqnorm", &wanda::cpu::silu_mul_sqnorm);
  m.impl("gelu_tanh_mul_sqnorm", &wanda::cpu::gelu_tanh_mul_sqnorm);
  m.impl("pack_24", &wanda::cpu::pack_24);
  m.impl("prune_pack_24", &wanda::cpu::prune_pack_24);
  m.impl("unpack_24", &wanda::cpu::unpack_24);
}

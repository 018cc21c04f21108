// solve_rows_ on CPU tensors: the steps of wanda_kernels/reference on tiles of rows, with torch's own
// products. A thread has a tile at a time, and its BLAS and everything else, called inside of a parallel
// region, take no threads of their own: the same bits for any number of them, and a tile's states stay near
// one core. Ten steps on 576 x 576, one thread: 58 ms, the reference 70 ms. It waits for all threads at each
// of a step's operations, which on two cores with other work took 4 x the time of this.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "../checks_refine.h"
#include "parallel.h"

namespace wanda::cpu {
namespace {

constexpr int64_t kRows = 96;             // SOLVED_ROWS
constexpr double kLeastResidual = 1e-10;  // as there
constexpr double kLeastCurvature = 1e-6;

struct Equations {
  at::Tensor h, root, inverse;
  int64_t steps;
};

at::Tensor squares(const at::Tensor& rows) { return at::linalg_vector_norm(rows, 2, 1).square_(); }

// Returns each row's error before and after: [rows, 2].
at::Tensor solve_tile(const at::Tensor& weight, const at::Tensor& mask, const at::Tensor& target,
                      const Equations& equations) {
  const auto& [h, root, inverse, steps] = equations;
  const at::Tensor kept = mask.logical_not().to(at::kFloat), dense = target.to(at::kFloat);
  const at::Tensor start = dense.masked_fill(mask, 0);
  at::Tensor u = start.sub(dense).mul_(root);
  at::Tensor r = at::mm(u, h), q = at::mul(u, r);
  const at::Tensor before = q.sum(1, false, at::kDouble);
  if (steps == 0) {
    weight.copy_(start);
    return at::stack({before, before}, 1);
  }
  r.mul_(kept).neg_();
  at::Tensor p = r.clone(), left = squares(r);
  const at::Tensor least = left * kLeastResidual;
  at::Tensor goes_on = left > 0;
  for (int64_t step = 0; step < steps; ++step) {
    at::mm_out(q, p, h);
    const at::Tensor curvature = (p * q).sum(1);
    goes_on.logical_and_((left > least).logical_and_(curvature > left * kLeastCurvature));
    if (!goes_on.any().item<bool>()) break;
    const at::Tensor alpha = at::where(goes_on, left / curvature, 0).unsqueeze(1);
    u.addcmul_(p, alpha);
    r.addcmul_(q, alpha, -1).mul_(kept);
    const at::Tensor was = left;
    left = squares(r);
    p.mul_(at::where(goes_on, left / was, 0).unsqueeze(1)).add_(r);
  }
  const at::Tensor solved = u.mul_(inverse).add_(dense).masked_fill_(mask, 0).to(weight.scalar_type());
  at::sub_out(p, solved, dense).mul_(root);
  at::mm_out(q, p, h);
  const at::Tensor after = q.mul_(p).sum(1, false, at::kDouble);
  const at::Tensor better = after < before;
  weight.copy_(at::where(better.unsqueeze(1), solved, start.to(weight.scalar_type())));
  return at::stack({before, at::where(better, after, before)}, 1);
}

void solve_rows_(at::Tensor weight, const at::Tensor& mask, const at::Tensor& gram, const at::Tensor& target,
                 double damping, int64_t steps, const OptionalTensor& sums) {
  check_solve("solve_rows_", weight, mask, gram, target, damping, steps, sums);
  const at::Tensor root = gram.diagonal().clamp_min(0).sqrt();
  const at::Tensor inverse = at::where(root > 0, root.reciprocal(), 0);
  const at::Tensor h = (gram * inverse.unsqueeze(1)).mul_(inverse);
  h.diagonal().fill_(1 + damping);
  const Equations equations{h, root, inverse, steps};
  over_tiles(weight.size(0), kRows, [&](int64_t row, int64_t count) {
    const auto tile = [&](const at::Tensor& whole) { return whole.narrow(0, row, count); };
    const at::Tensor errors = solve_tile(tile(weight), tile(mask), tile(target), equations);
    if (sums) tile(*sums).copy_(errors);
  });
}

}  // namespace
}  // namespace wanda::cpu

TORCH_LIBRARY_IMPL(wanda, CPU, m) { m.impl("solve_rows_", &wanda::cpu::solve_rows_); }

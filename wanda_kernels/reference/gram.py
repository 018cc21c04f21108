"""Gram matrices, and what goes by them, in plain PyTorch: refinement of masks, and updates of what they keep."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks


def add_gram_(gram: Tensor, x: Tensor, beta: float = 1.0, alpha: float = 1.0, first: int = 0) -> None:
    """By blocks of rows, each up to the diagonal."""
    _checks.check_gram("add_gram_", gram, x, beta, alpha, first)
    tokens = x.float()
    for begin in range(0, gram.shape[0], _checks.GRAM_STEP):
        end = min(begin + _checks.GRAM_STEP, gram.shape[0])
        rows, upto = tokens[:, first + begin : first + end], first + end
        gram[begin:end, :upto].addmm_(rows.t(), tokens[:, :upto], beta=beta, alpha=alpha)


# Refinement of a mask by swaps (SparseSwaps, arXiv 2512.10922). A row's error is p^T G' p: p its pruned weights, G' the
# Gram matrix with (1 + damping) times its diagonal.
#
# Every float operation is a float64 one, rounded on its own, in the order written here; of two float32 numbers float64
# holds the product exactly, so that c = G p gets one rounding for each column, in the order of the columns, fused or
# not. `c` leaves the damping out, which concerns a column alone: it is in what a column costs by itself. Costs are
# halves of what a change adds to the error: of un-pruning u  (1 - damping) / 2 * w_u^2 G_uu - w_u c_u,  of pruning v
# (1 + damping) / 2 * w_v^2 G_vv + w_v c_v  with the c that the first change has left. A NaN is never the least.

LEAST_GAIN = 1e-6  # the share of the error that a swap has to take away


def gram_products(mask: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    """c of each row: [C_out, C_in], float64."""
    pruned = weight.double().masked_fill(~mask, 0)
    c = torch.zeros_like(pruned)
    for column in range(weight.shape[1]):
        c += pruned[:, column, None] * gram[column].double()
    return c


def _pruned_error(mask: Tensor, w: Tensor, squares: Tensor, c: Tensor, damping: float) -> Tensor:
    """[C_out]: added up in the order of the columns."""
    error = torch.zeros(len(w), dtype=torch.float64, device=w.device)
    for terms in (w * c + damping * squares).masked_fill(~mask, 0).unbind(1):
        error += terms
    return error


def _least(cost: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the least cost (infinity where none is allowed) and its column, the lowest one among equals."""
    return torch.where(allowed & ~cost.isnan(), cost, torch.inf).min(dim=1)


def refine_rows_(
    mask: Tensor,
    weight: Tensor,
    gram: Tensor,
    damping: float = 0.3,
    most_swaps: int | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    most = _checks.check_refine_rows("refine_rows_", mask, weight, gram, damping, most_swaps, sums)
    return refine_rows_from(gram_products(mask, weight, gram), mask, weight, gram, damping, most, sums)


def refine_rows_from(
    c: Tensor, mask: Tensor, weight: Tensor, gram: Tensor, damping: float, most: int, sums: Tensor | None
) -> Tensor:
    """All rows at once, each until it has no swap left."""
    w, swaps = weight.double(), torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    squares = w * w * gram.diagonal().double()
    error = _pruned_error(mask, w, squares, c, damping)
    if sums is not None:
        sums[:, 0] = error
    kept_cost, pruned_cost = squares * (0.5 * (1 + damping)), squares * (0.5 * (1 - damping))
    left = torch.arange(len(w), device=w.device)

    def moved(c: Tensor, column: Tensor, sign: int) -> Tensor:
        """c where that column of each row left is pruned (1) or no longer (-1)."""
        return c + sign * w[left].gather(1, column[:, None]) * gram[column].double()

    for _ in range(most if w.numel() else 0):
        own, pruned, before = w[left], mask[left], c[left]
        gain, u = _least(pruned_cost[left] - own * before, pruned)
        after = moved(before, u, -1)
        loss, v = _least(kept_cost[left] + own * after, ~pruned)
        half = gain + loss
        after = moved(after, v, 1)
        bound = -0.5 * LEAST_GAIN * error[left].abs()
        failed = ~(half < bound)
        if failed.any():  # the other way round: first what to prune
            loss, other_v = _least(kept_cost[left] + own * before, ~pruned)
            other = moved(before, other_v, 1)
            gain, other_u = _least(pruned_cost[left] - own * other, pruned)
            half = torch.where(failed, loss + gain, half)
            after = torch.where(failed[:, None], moved(other, other_u, -1), after)
            u, v = torch.where(failed, other_u, u), torch.where(failed, other_v, v)
        good = half < bound
        left = left[good]
        if not len(left):
            break
        c[left], mask[left, u[good]], mask[left, v[good]] = after[good], False, True
        error[left] += 2 * half[good]
        swaps[left] += 1
    if sums is not None:
        sums[:, 1] = _pruned_error(mask, w, squares, c, damping)
    return swaps


def refine_nm_(
    mask: Tensor,
    weight: Tensor,
    gram: Tensor,
    n: int,
    m: int,
    damping: float = 0.3,
    sweeps: int = 4,
    sums: Tensor | None = None,
) -> Tensor:
    _checks.check_refine_nm("refine_nm_", mask, weight, gram, n, m, damping, sweeps, sums)
    uneven = (mask.view(len(mask), -1, m).sum(dim=2) != m - n).sum()
    _checks.check_groups("refine_nm_", int(uneven), n, m)
    return refine_nm_from(gram_products(mask, weight, gram), mask, weight, gram, m, damping, sweeps, sums)


def refine_nm_from(
    c: Tensor, mask: Tensor, weight: Tensor, gram: Tensor, m: int, damping: float, sweeps: int, sums: Tensor | None
) -> Tensor:
    """One group of all rows after the other: the best of its pairs, u the lowest among equals, then v."""
    w, swaps = weight.double(), torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    squares = w * w * gram.diagonal().double()
    error = _pruned_error(mask, w, squares, c, damping)
    if sums is not None:
        sums[:, 0] = error
    kept_cost, pruned_cost = squares * (0.5 * (1 + damping)), squares * (0.5 * (1 - damping))
    changed = torch.ones(len(w), dtype=torch.bool, device=w.device)  # rows that their last sweep has changed
    for _ in range(sweeps):
        before = swaps.clone()
        for begin in range(0, w.shape[1], m):
            group = slice(begin, begin + m)
            own, pruned = w[:, group], mask[:, group]
            after = c[:, None, group] - own[:, :, None] * gram[group, group].double()  # row, u, v
            half = (pruned_cost[:, group] - own * c[:, group])[:, :, None] + (
                kept_cost[:, None, group] + own[:, None, :] * after
            )
            allowed = pruned[:, :, None] & ~pruned[:, None, :]
            least, pair = _least(half.flatten(1), allowed.flatten(1))
            rows = (changed & (least < -0.5 * LEAST_GAIN * error.abs())).nonzero()[:, 0]
            u, v = begin + pair[rows] // m, begin + pair[rows] % m
            c[rows] -= w[rows, u][:, None] * gram[u].double()
            c[rows] += w[rows, v][:, None] * gram[v].double()
            mask[rows, u], mask[rows, v] = False, True
            error[rows] += 2 * least[rows]
            swaps[rows] += 1
        changed = swaps != before
        if not changed.any():
            break
    if sums is not None:
        sums[:, 1] = _pruned_error(mask, w, squares, c, damping)
    return swaps


# The kept weights of a row for the least error d^T G' d, d = w - target (ALPS, arXiv 2406.07831): conjugate gradients
# on what is kept, preconditioned by the diagonal.
#
# In u = d * sqrt(diag G), for which the matrix H has 1 + damping on its diagonal, the preconditioner is 1. Products and
# states are float32. How many rows a product has could change its bits: rows are taken in tiles that begin at multiples
# of SOLVED_ROWS, so that whoever has whole tiles gets the bits of the whole matrix.

SOLVED_ROWS = {"cpu": 96, "cuda": 512}  # a core's product of so few takes 5 % longer than of all; a GPU wants more
LEAST_RESIDUAL = 1e-10  # of a row's first one, squared: what is left then is rounding
LEAST_CURVATURE = 1e-6  # of H along a step: damping gives it as much as it is


def solve_rows_(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    target: Tensor,
    damping: float = 0.3,
    steps: int = 10,
    sums: Tensor | None = None,
) -> None:
    _checks.check_solve("solve_rows_", weight, mask, gram, target, damping, steps, sums)
    size = SOLVED_ROWS[weight.device.type]
    root = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(root > 0, root.reciprocal(), 0)  # a channel without inputs: its weights have no part in it
    h = (gram * inverse[:, None]).mul_(inverse)
    h.diagonal().fill_(1 + damping)
    for begin in range(0, len(weight), size):
        tile = slice(begin, begin + size)
        errors = _solve_tile_(weight[tile], mask[tile], h, target[tile], root, inverse, steps)
        if sums is not None:
            sums[tile] = errors


def _solve_tile_(
    weight: Tensor, mask: Tensor, h: Tensor, target: Tensor, root: Tensor, inverse: Tensor, steps: int
) -> Tensor:
    """Returns the error of ``target`` without its pruned weights, and of what is written: [rows, 2], float64."""
    kept, dense = (~mask).float(), target.float()
    start = dense.masked_fill(mask, 0)
    u = (start - dense).mul_(root)
    r, q = torch.mm(u, h), torch.empty_like(u)
    before = torch.mul(u, r, out=q).sum(dim=1, dtype=torch.float64)
    if not steps:
        weight.copy_(start)
        return torch.stack([before, before], dim=1)
    r.mul_(kept).neg_()
    p = r.clone()
    left = torch.linalg.vector_norm(r, dim=1).square_()
    least, goes_on = LEAST_RESIDUAL * left, left > 0
    for _ in range(steps):
        torch.mm(p, h, out=q)
        curvature = (p * q).sum(dim=1)
        goes_on &= (left > least) & (curvature > LEAST_CURVATURE * left)
        if not goes_on.any():
            break
        alpha = torch.where(goes_on, left / curvature, 0)[:, None]
        u.addcmul_(p, alpha)
        r.addcmul_(q, alpha, value=-1).mul_(kept)
        was, left = left, torch.linalg.vector_norm(r, dim=1).square_()
        p.mul_(torch.where(goes_on, left / was, 0)[:, None]).add_(r)
    # What is written is rounded, and rounding may cost more than was gained: where it does, the row is as it began.
    solved = u.mul_(inverse).add_(dense).mul_(kept).to(weight.dtype)
    torch.mm(torch.sub(solved, dense, out=p).mul_(root), h, out=q)
    after = q.mul_(p).sum(dim=1, dtype=torch.float64)
    better = after < before
    weight.copy_(torch.where(better[:, None], solved, start.to(weight.dtype)))
    return torch.stack([before, torch.where(better, after, before)], dim=1)

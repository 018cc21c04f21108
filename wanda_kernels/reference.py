"""The operators in plain PyTorch: short, obvious, and the truth that every backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from . import _checks

__all__ = [
    "add_gram_", "add_sqnorm_", "bitmap_experts", "bitmap_linear", "gelu_tanh_mul_sqnorm", "nm_mask", "pack_24",
    "prune_nm_", "prune_pack_24", "prune_rows_", "refine_nm_", "refine_rows_", "rms_norm_sqnorm", "row_mask",
    "silu_mul_sqnorm", "solve_rows_", "sparse24_experts", "sparse24_linear", "unpack_24", "unpack_bitmap",
    "unpack_sparse24",
]  # fmt: skip


# Row selection (Wanda, arXiv 2306.11695, section 3, eq. 1, compared per output row).


# A weight is a matrix [C_out, C_in] with its norm [C_in], or a stack of them, [E, C_out, C_in] with [E, C_in].


def scores(weight: Tensor, norm: Tensor) -> Tensor:
    """``|W| * norm`` in float32: one multiplication, rounded to nearest."""
    return weight.abs().float() * norm.unsqueeze(-2)


def write_score_sums(score: Tensor, mask: Tensor, score_sums: Tensor) -> None:
    """Per row: sum of the squared scores that are pruned, and of all."""
    squares = score.square()
    score_sums[..., 0] = squares.masked_fill(~mask, 0).sum(dim=-1)
    score_sums[..., 1] = squares.sum(dim=-1)


def _prune_(weight: Tensor, norm: Tensor, mask: Tensor, score_sums: Tensor | None) -> None:
    if score_sums is not None:
        write_score_sums(scores(weight, norm), mask, score_sums)
    weight.masked_fill_(mask, 0)


def row_mask(weight: Tensor, norm: Tensor, sparsity: float) -> Tensor:
    _checks.check_rows("row_mask", weight, norm, sparsity)
    score = scores(weight, norm)
    k = int(weight.shape[-1] * sparsity)
    pruned = torch.sort(score, dim=-1, stable=True).indices[..., :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, pruned, True)


def prune_rows_(weight: Tensor, norm: Tensor, sparsity: float, score_sums: Tensor | None = None) -> None:
    _checks.check_rows("prune_rows_", weight, norm, sparsity, score_sums)
    _prune_(weight, norm, row_mask(weight, norm, sparsity), score_sums)


# N:M selection (section 3.1: N of every M consecutive inputs are kept).


def nm_mask(weight: Tensor, norm: Tensor, n: int, m: int) -> Tensor:
    _checks.check_nm("nm_mask", weight, norm, n, m)
    groups = scores(weight, norm).reshape(*weight.shape[:-1], weight.shape[-1] // m, m)
    pruned = torch.sort(groups, dim=-1, stable=True).indices[..., : m - n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, pruned, True).view(weight.shape)


def prune_nm_(weight: Tensor, norm: Tensor, n: int, m: int, score_sums: Tensor | None = None) -> None:
    _checks.check_nm("prune_nm_", weight, norm, n, m, score_sums)
    _prune_(weight, norm, nm_mask(weight, norm, n, m), score_sums)


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


# 2:4 packing: torch's own conversions to and from its CUTLASS layout.


def pack_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    _checks.check_packable("pack_24", weight)
    overfull = int((weight.reshape(-1, 4).ne(0).sum(dim=1) > 2).sum())
    if overfull:
        raise ValueError(
            f"wanda::pack_24: weight must be 2:4 sparse, {overfull} of its groups of four have more than two non-zeros"
        )
    return sparse_semi_structured_from_dense_cutlass(weight.contiguous())


def prune_pack_24(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    _checks.check_packable("prune_pack_24", weight, norm)
    pruned = weight.masked_fill(nm_mask(weight, norm, 2, 4), 0)
    return sparse_semi_structured_from_dense_cutlass(pruned.contiguous())


def unpack_24(values: Tensor, metadata: Tensor) -> Tensor:
    _checks.check_packed("unpack_24", values, metadata)
    return sparse_semi_structured_to_dense_cutlass(values.contiguous(), metadata.contiguous())


# Packed sparse weights: unpacking, and the product with the unpacked weight.


def unpack_bitmap(values: Tensor, bitmap: Tensor, starts: Tensor) -> Tensor:
    _checks.check_bitmap("unpack_bitmap", values, bitmap, starts)
    kept = (bitmap[:, :, None] >> torch.arange(8, device=bitmap.device)) & 1
    kept = kept.bool().flatten(1)
    weight = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    first = int(starts[0])  # not 0 where a band of rows is given
    weight[kept] = values[first : first + int(kept.sum())]
    return weight


def unpack_sparse24(values: Tensor, indices: Tensor) -> Tensor:
    _checks.check_sparse24("unpack_sparse24", values, indices)
    inside = (indices[:, :, None] >> torch.arange(0, 8, 2, device=indices.device)) & 3  # column in its group of four
    groups = inside.view(indices.shape[0], -1, 2).long()
    bits = values.view(torch.int32 if values.element_size() == 4 else torch.int16)  # moved as integers: NaN stays
    weight = torch.zeros(*groups.shape[:2], 4, dtype=bits.dtype, device=values.device)
    return weight.scatter_(2, groups, bits.view(groups.shape)).flatten(1).view(values.dtype)


def bitmap_linear(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, bias: Tensor | None = None) -> Tensor:
    _checks.check_bitmap_linear("bitmap_linear", x, values, bitmap, starts, bias)
    return linear(x, unpack_bitmap(values, bitmap, starts), bias)


def sparse24_linear(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> Tensor:
    _checks.check_sparse24_linear("sparse24_linear", x, values, indices, bias)
    return linear(x, unpack_sparse24(values, indices), bias)


# Products of rows sorted by expert, each with its own expert's weight of a stack [E * C_out, C_in].


def bitmap_experts(x: Tensor, values: Tensor, bitmap: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    _checks.check_bitmap_experts("bitmap_experts", x, values, bitmap, starts, ends)
    return _experts("bitmap_experts", x, unpack_bitmap(values, bitmap, starts), ends)


def sparse24_experts(x: Tensor, values: Tensor, indices: Tensor, ends: Tensor) -> Tensor:
    _checks.check_sparse24_experts("sparse24_experts", x, values, indices, ends)
    return _experts("sparse24_experts", x, unpack_sparse24(values, indices), ends)


def _experts(op: str, x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    weights = stack.view(len(ends), -1, stack.shape[1])
    y = x.new_zeros(x.shape[0], weights.shape[1])
    begin = 0
    for weight, end in zip(weights, _checks.check_ends(op, ends, x.shape[0]), strict=True):
        y[begin:end] = linear(x[begin:end], weight)
        begin = end
    return y


# Column sums of squares (section 3, eq. 1: the square of ||X_j||_2).


# Tokens that are summed in float32 before they are added to the float64 total of their sequence.
CHUNK = 4096


def _sum_of_squares(tokens: Tensor) -> Tensor:
    """[tokens, C_in] -> [C_in], float32: one token after the other, in chunks that are added in float64."""
    total = torch.zeros(tokens.shape[1], dtype=torch.float64, device=tokens.device)
    for chunk in tokens.float().square().split(CHUNK):
        partial = torch.zeros(tokens.shape[1], dtype=torch.float32, device=tokens.device)
        for squares in chunk:
            partial += squares
        total += partial
    return total.float()


def add_gram_(gram: Tensor, x: Tensor, beta: float = 1.0, alpha: float = 1.0, first: int = 0) -> None:
    """By blocks of rows, each up to the diagonal."""
    _checks.check_gram("add_gram_", gram, x, beta, alpha, first)
    tokens = x.float()
    for begin in range(0, gram.shape[0], _checks.GRAM_STEP):
        end = min(begin + _checks.GRAM_STEP, gram.shape[0])
        rows, upto = tokens[:, first + begin : first + end], first + end
        gram[begin:end, :upto].addmm_(rows.t(), tokens[:, :upto], beta=beta, alpha=alpha)


def add_sqnorm_(sqnorm: Tensor, x: Tensor, token_mask: Tensor | None = None, ends: Tensor | None = None) -> None:
    sequences, tokens, cols = _checks.check_sqnorm("add_sqnorm_", sqnorm, x, token_mask, ends)
    if ends is not None:
        begin = 0
        for row, end in zip(sqnorm, _checks.check_ends("add_sqnorm_", ends, tokens), strict=True):
            if end > begin:
                row += _sum_of_squares(x[begin:end])
            begin = end
        return
    x = x.reshape(sequences, tokens, cols)
    counted = None if token_mask is None else token_mask.reshape(sequences, tokens)
    for sequence in range(sequences):
        one = x[sequence] if counted is None else x[sequence][counted[sequence]]
        row = sqnorm[sequence] if sqnorm.dim() == 2 else sqnorm
        row += _sum_of_squares(one)


def norm_of_sequences(sqnorm: Tensor) -> Tensor:
    """[sequences, C_in] -> [C_in]: root of the running mean, with the steps of ``WrappedGPT.add_batch``."""
    mean = torch.zeros(sqnorm.shape[1], dtype=torch.float32, device=sqnorm.device)
    for seen, one in enumerate(sqnorm):
        mean *= seen / (seen + 1)
        # by float64: torch's vectorised float32 sqrt is off by one bit in a tenth of the cases, torch.norm's is not
        mean += one.double().sqrt().float() ** 2 / (seen + 1)
    return mean.sqrt()


# RMSNorm and the column sums of squares of its output.


def rms_norm_sqnorm(
    x: Tensor, weight: Tensor, eps: float, sqnorm: Tensor, token_mask: Tensor | None = None, unit_offset: bool = False
) -> Tensor:
    _checks.check_rms_norm_sqnorm("rms_norm_sqnorm", x, weight, eps, sqnorm, token_mask)
    values = x.float()
    scaled = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    y = (scaled * (1.0 + weight.float())).to(x.dtype) if unit_offset else weight * scaled.to(x.dtype)
    add_sqnorm_(sqnorm, y, token_mask)
    return y


# activation(gate) * up and its column sums of squares.


def silu_mul_sqnorm(gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> Tensor:
    _checks.check_act_mul_sqnorm("silu_mul_sqnorm", gate, up, sqnorm, token_mask)
    y = silu(gate) * up
    add_sqnorm_(sqnorm, y, token_mask)
    return y


def gelu_tanh_mul_sqnorm(gate: Tensor, up: Tensor, sqnorm: Tensor, token_mask: Tensor | None = None) -> Tensor:
    _checks.check_act_mul_sqnorm("gelu_tanh_mul_sqnorm", gate, up, sqnorm, token_mask)
    y = gelu(gate, approximate="tanh") * up
    add_sqnorm_(sqnorm, y, token_mask)
    return y

"""Levels chosen by what a layer computes: what rounding one weight costs, the levels of later columns make up for.

Sources: QuantEase (arXiv 2309.01885): coordinate descent on the levels, a column of all rows at a time; that the mask
of a pruned weight stays: SparseGPT (arXiv 2301.00774); the sums that wait for the end of a block of columns: GPTQ
(arXiv 2210.17323).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.solve import rows_of_tile
from .values import ValueType, dequantize, quantize, spread

DAMPING = 0.3
PASSES = 3
BLOCK = 64  # columns whose products with later ones wait for its end
TILES = 16  # whose rows take a column's step together: a step of fewer rows is mostly the calls of it


def quantize_rows(weight: Tensor, kind: ValueType, gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """As :func:`quantize`, for the least error of the layer's outputs in place of that of the weights.

    A row's error is ``d @ G @ d``: d what rounding changes, ``G = gram + damping * gram.diag()``. Scales are those of
    the least squared error, each weight's times its channel's square. From the nearest levels three passes over the
    columns give each kept weight the level that is best beside all others as they are. A row that :func:`quantize`
    serves better gets its levels and scales. Float32, in steps that give a row the same bits for any number of threads,
    and for any rows around it that begin at a multiple of ``rows_of_tile``.

    Args:
        weight: [C_out, C_in], float32, bfloat16 or float16, finite. What is 0 in it is pruned and stays so.
        kind: bits and columns of a group.
        gram: [C_in, C_in], float32: X^T X of the layer's inputs X, up to a factor; finite, symmetric and positive
            semi-definite (not checked).
        damping: >= 0; how much a channel's own square counts more than what channels have in common: a large one
            leaves the nearest levels.

    Returns:
        levels [C_out, C_in] int8 and scales [C_out, groups] bfloat16.

    Raises:
        ValueError: a weight is not finite, or ``gram`` is of another shape.
    """
    cols = weight.shape[1]
    if tuple(gram.shape) != (cols, cols):
        raise ValueError(f"gram must be [{cols}, {cols}] for a weight of {cols} columns, got {list(gram.shape)}")
    damped = gram.clone()
    damped.diagonal().mul_(1 + damping)
    size = TILES * rows_of_tile(weight.device)
    parts = [_quantize_part(part, kind, damped) for part in weight.split(size)]
    levels, scales = (torch.cat(one) for one in zip(*parts, strict=True))
    return levels, scales


def _quantize_part(weight: Tensor, kind: ValueType, gram: Tensor) -> tuple[Tensor, Tensor]:
    target = weight.float()
    levels, scales = quantize(weight, kind, gram.diagonal())
    levels = _descend(target, levels, scales, kind, gram)
    nearest = quantize(weight, kind)
    ours, theirs = (_errors(dequantize(*one, kind) - target, gram) for one in ((levels, scales), nearest))
    is_better = (ours < theirs)[:, None]
    return torch.where(is_better, levels, nearest[0]), torch.where(is_better, scales, nearest[1])


def _descend(target: Tensor, levels: Tensor, scales: Tensor, kind: ValueType, gram: Tensor) -> Tensor:
    """The levels after all passes. Transposed, so that a column lies together.

    A column's step is of products, sums and quotients that are rounded one by one, so that no vector's length shows.
    """
    cols = target.shape[1]
    most = 1 << (kind.bits - 1)
    scale = spread(scales, kind, cols).t().contiguous()
    unit = scale.where(scale > 0, 1.0)
    is_fixed = ((target == 0) | (scale == 0).t()).t().contiguous()
    now = levels.t().float()
    slope = _product((now * scale).t() - target, gram).t().contiguous()  # half the error's, by each level's weight
    curvature = gram.diagonal()
    unit.mul_(curvature.where(curvature > 0, 1.0)[:, None])
    moved, part = torch.empty_like(slope[:BLOCK]), torch.empty_like(slope[:BLOCK])
    for _ in range(PASSES):
        for begin in range(0, cols, BLOCK):
            end = min(begin + BLOCK, cols)
            own, curvatures, change = slope[begin:end].clone(), gram[begin:end, begin:end], part[: end - begin]
            for place, column in enumerate(range(begin, end)):
                best = (now[column] - own[place] / unit[column]).round_().clamp_(-most, most - 1)
                best = torch.where(is_fixed[column], now[column], best)
                torch.mul(best - now[column], scale[column], out=moved[place])
                now[column] = best
                own += torch.mul(curvatures[:, place, None], moved[place], out=change)
            slope += _product(moved[: end - begin].t(), gram[begin:end]).t()
    return now.t().to(torch.int8).contiguous()


def _product(rows: Tensor, gram: Tensor) -> Tensor:
    """``rows @ gram`` in tiles of one size: a BLAS may add in another order for fewer rows or other threads."""
    size = rows_of_tile(rows.device)
    whole = torch.zeros(-(-len(rows) // size) * size, rows.shape[1], device=rows.device)
    whole[: len(rows)] = rows
    return torch.cat([tile @ gram for tile in whole.split(size)])[: len(rows)]


def _errors(rows: Tensor, gram: Tensor) -> Tensor:
    """``d @ gram @ d`` of each row d: [C_out], float64."""
    return (_product(rows, gram).double() * rows).sum(dim=1)

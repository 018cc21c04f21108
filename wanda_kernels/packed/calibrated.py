"""Levels chosen by what a layer computes: what rounding one weight costs, the levels of later columns make up for.

Sources: QuantEase (arXiv 2309.01885): coordinate descent on the levels, a column of all rows at a time; that the mask
of a pruned weight stays: SparseGPT (arXiv 2301.00774); the sums that wait for the end of a block of columns: GPTQ
(arXiv 2210.17323).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.solve import rows_of_tile
from .values import ValueType, dequantize, quantize, spread

# SmolLM2 at 50 %, refined and updated, groups of 64: perplexity on help texts and on source. Float values 36.6, 12.3;
# nearest 47.6, 17.4; with scales by weighted squares 44.0, 15.2. From there GPTQ 42.7, 15.8; three passes with damping
# 0 39.7, 14.4, with 0.3 39.4, 14.0, with 1 39.1, 13.9; with 0.3 one pass 40.3, 14.9, six 39.1, 13.8.
DAMPING = 1.0
PASSES = 3
BLOCK = 64  # columns whose products with later ones wait for its end
TILES = 16  # whose rows take a column's step together: a step of fewer rows is mostly the calls of it


def quantize_rows(weight: Tensor, kind: ValueType, gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """As :func:`quantize`, for the least error of the layer's outputs in place of that of the weights.

    A row's error is ``d @ G @ d``: d what rounding changes, ``G = gram + damping * gram.diag()``. Scales are those of
    the least squared error, each weight's counted by its channel's square. From the nearest levels three passes over
    the columns give each kept weight the level that is best beside all others as they are. A row that :func:`quantize`
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
    rows, size = len(weight), rows_of_tile(weight.device)
    target = _transposed(weight, size)
    nearest = quantize(weight, kind)
    levels, scales = quantize(weight, kind, gram.diagonal())
    steps = _transposed(spread(scales, kind, len(gram)), size)
    found = _transposed(levels, size)
    slope = _product(gram, found * steps - target, size)
    for _ in range(PASSES):
        _pass_(found, slope, steps, target, gram, 1 << (kind.bits - 1), size)
    ours = _errors(found * steps - target, slope)
    difference = _transposed(dequantize(*nearest, kind), size) - target
    theirs = _errors(difference, _product(gram, difference, size))
    is_better = (ours < theirs)[:rows, None]
    levels = found.t()[:rows].to(torch.int8)
    return torch.where(is_better, levels, nearest[0]), torch.where(is_better, scales, nearest[1])


def _transposed(rows: Tensor, size: int) -> Tensor:
    """[C_in, C_out up to a multiple of ``size``], float32: a column lies together."""
    return pad(rows.float(), (0, 0, 0, -len(rows) % size)).t().contiguous()


def _pass_(levels: Tensor, slope: Tensor, steps: Tensor, target: Tensor, gram: Tensor, most: int, size: int) -> None:
    """Over all columns, each of all rows at once; ``slope``, ``gram @ (levels * steps - target)``, is kept up to date.

    A column's step is of operations on single numbers: what is beside a row does not show.
    """
    diagonal = gram.diagonal()
    units = steps.where(steps > 0, 1.0) * diagonal.where(diagonal > 0, 1.0)[:, None]
    is_free = (target != 0) & (steps > 0)
    low, high = is_free * float(-most), is_free * float(most - 1)
    moved = torch.empty_like(slope[:BLOCK])
    for begin in range(0, len(gram), BLOCK):
        block = slice(begin, begin + BLOCK)
        own, within = slope[block].clone(), gram[block, block].unsqueeze(2)
        columns = (levels[block], steps[block], units[block], low[block], high[block], own, moved[: len(own)])
        rows = zip(*(one.unbind() for one in columns), strict=True)
        for place, (level, step, unit, least, largest, descent, change) in enumerate(rows):
            best = (level - descent / unit).round_().clamp_(least, largest)
            torch.mul(best - level, step, out=change)
            level.copy_(best)
            own[place + 1 :].addcmul_(within[place + 1 :, place], change)
        for tile in range(0, slope.shape[1], size):
            one = slice(tile, tile + size)
            slope[:, one].addmm_(gram[:, block], moved[: len(own), one])


def _product(gram: Tensor, columns: Tensor, size: int) -> Tensor:
    """``gram @ columns``, in tiles of one size: a BLAS may add in another order for others."""
    product = torch.empty_like(columns)
    for tile in range(0, columns.shape[1], size):
        one = slice(tile, tile + size)
        torch.mm(gram, columns[:, one], out=product[:, one])
    return product


def _errors(difference: Tensor, slope: Tensor) -> Tensor:
    """``d @ gram @ d`` of each row d, transposed in ``difference``: float64."""
    return (difference.double() * slope).sum(dim=0)

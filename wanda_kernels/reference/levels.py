"""Levels chosen by what a layer computes, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import _checks_quantized as _checks
from .gram import SOLVED_ROWS

BLOCK = 64  # columns whose products with later ones wait for its end
TILES = 16  # whose rows take a column's step together: a step of fewer rows is mostly the calls of it


def calibrate_levels_(
    levels: Tensor,
    weight: Tensor,
    scales: Tensor,
    gram: Tensor,
    bits: int,
    damping: float = 1.0,
    passes: int = 3,
    errors: Tensor | None = None,
) -> None:
    op = "calibrate_levels_"
    group = _checks.check_levels(op, levels, weight, scales, gram, bits, damping, passes, errors)
    damped, size = gram.clone(), SOLVED_ROWS[weight.device.type]
    damped.diagonal().mul_(1 + damping)
    for begin in range(0, len(weight), TILES * size):
        part = slice(begin, begin + TILES * size)
        rows = len(weight[part])
        target, found = _transposed(weight[part], size), _transposed(levels[part], size)
        steps = _transposed(scales[part], size).repeat_interleave(group, dim=0)[: len(gram)]
        slope = _product(damped, found * steps - target, size)
        for _ in range(passes):
            _pass_(found, slope, steps, target, damped, 1 << (bits - 1), size)
        levels[part] = found.t()[:rows].to(torch.int8)
        if errors is not None:
            errors[part] = ((found * steps - target).double() * slope).sum(dim=0)[:rows]


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

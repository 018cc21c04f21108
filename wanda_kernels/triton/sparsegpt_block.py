"""SparseGPT's walk through a block of columns in one launch: the steps of ``methods.sparsegpt``'s loop.

Rows do not depend on each other: a program has all columns of a few rows in registers, and takes column after column
out of them. One order, so the same bits in every run; those of the loop but for the rounding of ``w - u * e``, which is
one fused multiply-add here and in most elements of ``addr_``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .partials import on_device_of

ROWS = 4  # a program: with 128 columns 16 values a lane of one warp, which needs no barrier


@triton.jit
def of_column(tile, is_column):
    """[BLOCK, ROWS] -> [ROWS]."""
    return tl.sum(tl.where(is_column[:, None], tile, tl.zeros_like(tile)), axis=0)


@triton.jit(do_not_specialize=["width"])
def sparsegpt_block_kernel(
    work, pruned, upper, scale, errors, width, rows,
    N: tl.constexpr, M: tl.constexpr, SQUARED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``M`` 0: what goes is in ``pruned``; else it is decided for M columns at a time, when their turn comes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_row = row < rows
    at = column.to(tl.int64)[:, None] * rows + row[None, :]
    inside = (column < width)[:, None] & is_row[None, :]
    weight = tl.load(work + at, mask=inside, other=0.0)
    step: tl.constexpr = M if M > 0 else BLOCK
    if M > 0:
        gone = tl.zeros([BLOCK, ROWS], tl.int32)
        factor = tl.load(scale + column, mask=column < width, other=1.0)[:, None]
    else:
        gone = tl.load(pruned + at, mask=inside, other=0).to(tl.int32)
    for first in range(0, width, step):
        if M > 0:
            score = tl.div_rn(weight * weight, factor * factor) if SQUARED else tl.abs(weight) * factor
            rank = tl.zeros([BLOCK, ROWS], tl.int32)  # in the group, among equals the lower column first
            for k in range(first, first + M):
                one = of_column(score, column == k)[None, :]
                rank += ((one < score) | ((one == score) & (k < column)[:, None])).to(tl.int32)
            is_group = (column >= first) & (column < first + M)
            gone = tl.where(is_group[:, None], (rank < M - N).to(tl.int32), gone)
        for i in range(first, min(first + step, width)):
            is_column = column == i
            value = of_column(weight, is_column)
            kept = tl.where(of_column(gone, is_column) != 0, 0.0, value)
            error = tl.div_rn(value - kept, tl.zeros_like(value) + tl.load(upper + i * width + i))
            tl.store(errors + tl.full([ROWS], i, tl.int64) * rows + row, error, mask=is_row)
            is_later = (column > i) & (column < width)
            u = tl.load(upper + i * width + column, mask=is_later, other=0.0)
            weight = tl.where(is_later[:, None], weight - u[:, None] * error[None, :], weight)
            weight = tl.where(is_column[:, None], kept[None, :], weight)
    tl.store(work + at, weight, mask=inside)


def sparsegpt_block(
    work: Tensor, upper: Tensor, pruned: Tensor | None, scale: Tensor, is_squared: bool, n: int, m: int
) -> Tensor:
    """Prunes and updates ``work``, [columns, C_out], in place.

    Args:
        upper: [columns, columns].
        pruned: [columns, C_out], bool; None: N of every M columns are kept.
        scale: [columns], and ``is_squared``: scores are ``W^2 / scale^2``, else ``|W| * scale``.

    Returns:
        [columns, C_out]: what each column lost, over its diagonal element of ``upper``.
    """
    width, rows = work.shape
    errors = torch.empty_like(work)
    block = triton.next_power_of_2(width)
    with on_device_of(work):
        sparsegpt_block_kernel[(triton.cdiv(rows, ROWS),)](
            work, work if pruned is None else pruned.view(torch.uint8), upper.contiguous(), scale, errors,
            width, rows, N=n, M=m if pruned is None else 0, SQUARED=is_squared, ROWS=ROWS, BLOCK=block,
            num_warps=max(1, block // 128),
        )  # fmt: skip
    return errors

"""Gram matrices: what the channels of an input have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks import check_gram


def add_gram_(gram: Tensor, x: Tensor, beta: float = 1.0, alpha: float = 1.0, first: int = 0) -> None:
    """``gram = beta * gram + alpha * x^T x`` in place, on and below the diagonal. What is above it is left, or written
    with the same sums: see :func:`mirror_`.

    On the CPU, tiles of the matrix are products of BLAS on one thread each, in float32: the number of threads changes
    no bit, and no more than half of the square is computed (0.6 of a whole product's time at 4,096 columns, 0.7 at
    576). Elsewhere a product for each block of rows.

    Args:
        gram: [rows, C_in], float32, rows ``first`` to ``first + rows`` of the matrix [C_in, C_in].
        x: [tokens, C_in], float32, bfloat16 or float16; converted to float32.
        first: a multiple of 384, so that the tiles are those of the whole matrix.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.

    Source: SparseGPT (arXiv 2301.00774), whose Hessian is twice this.
    """
    torch.ops.wanda.add_gram_(gram, x, beta, alpha, first)


def mirror_(gram: Tensor) -> None:
    """Copy what is below the diagonal of ``gram``, [.., C_in, C_in], to above it, in place."""
    cols = gram.shape[-1]
    for begin in range(0, cols, MIRRORED):  # of a whole copy there would be another 3.3 GB at 28,672 columns
        end = min(begin + MIRRORED, cols)
        square = gram[..., begin:end, begin:end]
        square.copy_(square.tril() + square.tril(-1).mT)
        gram[..., begin:end, end:] = gram[..., end:, begin:end].mT


MIRRORED = 512  # columns at once

fake("add_gram_", check_gram)

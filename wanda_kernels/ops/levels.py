"""Levels chosen by what a layer computes: what rounding one weight costs, the levels of later columns make up for."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks_quantized import check_levels


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
    """Give each row the levels whose outputs come near to those of ``weight``'s; ``levels`` is written.

    A row's error is ``d @ G @ d``: ``d = levels * scales - weight``, and ``G = gram + damping * gram.diag()``. A pass
    goes over the columns, and gives each weight the level that is best beside all others as they are: coordinate
    descent. Where ``weight`` or the scale is 0 the level becomes 0; where the diagonal of ``gram`` is 0 it stays. Steps
    are float32, and give a row the same bits for any number of threads and for any rows around it that begin at a
    multiple of ``ops.solve.rows_of_tile``.

    Args:
        levels: [C_out, C_in], int8: where the descent begins.
        weight: [C_out, C_in], float32, bfloat16 or float16, finite (not checked).
        scales: [C_out, groups], bfloat16, >= 0 (not checked): of 32, 64, 128 or all columns.
        gram: [C_in, C_in], float32: X^T X of the layer's inputs X, up to a factor; finite, symmetric and positive
            semi-definite (not checked).
        bits: 8 or 4; levels are -128 .. 127 or -8 .. 7.
        damping: >= 0; how much a channel's own square counts more than what channels have in common.
        passes: over the columns, >= 0; 0 leaves the levels, and tells their errors.
        errors: [C_out], float64, contiguous, or None. Receives each row's error with the levels written: float32
            products, added up in float64.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.

    Sources: QuantEase (arXiv 2309.01885); that the mask of a pruned weight stays: SparseGPT (arXiv 2301.00774).
    """
    torch.ops.wanda.calibrate_levels_(levels, weight, scales, gram, bits, damping, passes, errors)


fake("calibrate_levels_", check_levels)

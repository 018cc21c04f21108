"""Levels chosen by what a layer computes (:mod:`wanda_kernels.ops.levels`), where they are the better ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import calibrate_levels_
from .values import ValueType, quantize

# SmolLM2 at 50 %, refined and updated, groups of 64: perplexity on help texts and on source. Float values 36.6, 12.3;
# nearest 47.6, 17.4; with scales by weighted squares 44.0, 15.2. From there GPTQ 42.7, 15.8; three passes with damping
# 0 39.7, 14.4, with 0.3 39.4, 14.0, with 1 39.1, 13.9; with 0.3 one pass 40.3, 14.9, six 39.1, 13.8.
DAMPING = 1.0
PASSES = 3


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
    nearest, chosen = quantize(weight, kind), quantize(weight, kind, gram.diagonal())
    errors = torch.empty(2, len(weight), dtype=torch.float64, device=weight.device)
    for found, passes, error in ((nearest, 0, errors[0]), (chosen, PASSES, errors[1])):
        calibrate_levels_(found[0], weight, found[1], gram, kind.bits, damping, passes, error)
    is_better = (errors[1] < errors[0])[:, None]
    levels, scales = (torch.where(is_better, *both) for both in zip(chosen, nearest, strict=True))
    return levels, scales

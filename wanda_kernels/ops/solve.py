"""Better weights on a fixed mask: what is kept of a row makes up for what is not."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._backend import fake
from .._checks import check_solve


def solve_rows_(
    weight: Tensor,
    mask: Tensor,
    gram: Tensor,
    target: Tensor,
    damping: float = 0.3,
    steps: int = 10,
    sums: Tensor | None = None,
) -> None:
    """Give the kept weights of each row the values that come nearest to ``target``'s outputs; ``weight`` is written.

    A row's error is ``d @ G @ d``: ``d = weight - target``, and ``G = gram + damping * gram.diag()``. Conjugate
    gradient steps on the kept weights, from the target's own, with the diagonal as preconditioner; a row ends early
    where nothing is left to gain. Pruned weights become 0, those of channels without inputs (0 on the diagonal) stay
    the target's. Steps are float32; what is written is rounded to ``weight``'s dtype, and a row that would not have a
    smaller error then keeps the target's weights.

    Args:
        weight: [C_out, C_in], float32, bfloat16 or float16; what it holds is not read.
        mask: [C_out, C_in], bool, contiguous, True = pruned.
        gram: [C_in, C_in], float32: X^T X of the layer's inputs X, finite, symmetric and positive semi-definite (not
            checked).
        target: [C_out, C_in], as ``weight``, of its dtype: the dense weights.
        damping: >= 0; how much a channel's own square counts more than what channels have in common: a large one
            leaves the target's weights as they are.
        steps: of a row at most, >= 0.
        sums: [C_out, 2], float64, contiguous, or None. Receives each row's error with the target's weights, and with
            what was written: float32 products, added up in float64.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.

    Source: ALPS (arXiv 2406.07831), its last step.
    """
    torch.ops.wanda.solve_rows_(weight, mask, gram, target, damping, steps, sums)


def rows_of_tile(device: torch.device) -> int:
    """Whoever solves rows of a matrix, from a multiple of it to another or to the end, gets the bits of the whole."""
    return reference.gram.SOLVED_ROWS[device.type]


fake("solve_rows_", check_solve)

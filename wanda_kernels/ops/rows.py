"""Unstructured selection within each output row (Wanda, section 3: per-output comparison group)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks import check_rows


def prune_rows_(weight: Tensor, norm: Tensor, sparsity: float, score_sums: Tensor | None = None) -> None:
    """Set the ``k = int(C_in * sparsity)`` weights of each row with the smallest ``|W| * norm`` to +0, in place.

    Equivalent to::

        score = weight.abs().float() * norm
        pruned = torch.sort(score, dim=1, stable=True).indices[:, : int(weight.shape[1] * sparsity)]
        weight.scatter_(1, pruned, 0)

    Among equal scores the lowest column is pruned first; NaN counts as the largest score.

    A stack of matrices, such as a layer's experts, each with a norm of its own, takes one launch.

    Args:
        weight: [C_out, C_in] or [E, C_out, C_in], float32, bfloat16 or float16. Any strides; where columns are
            adjacent and all rows equally far apart nothing is copied, else one matrix at a time.
        norm: [C_in] or [E, C_in], float32, on the same device: the L2 norm of each input channel.
        sparsity: the share of each row to prune, in [0, 1).
        score_sums: [C_out, 2] or [E, C_out, 2], float32, contiguous, or None. Receives per row the sum of the
            squared scores that were pruned, and of all.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.

    Source: Wanda (arXiv 2306.11695), eq. 1 and algorithm 1.
    """
    torch.ops.wanda.prune_rows_(weight, norm, sparsity, score_sums)


def row_mask(weight: Tensor, norm: Tensor, sparsity: float) -> Tensor:
    """The mask of :func:`prune_rows_`: the shape of ``weight``, bool, True = pruned. ``weight`` is not written."""
    return torch.ops.wanda.row_mask(weight, norm, sparsity)


fake("prune_rows_", check_rows)
fake("row_mask", check_rows, lambda weight, *_: weight.new_empty(weight.shape, dtype=torch.bool))

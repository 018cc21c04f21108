"""Refinement of a mask by swaps: which weights are pruned changes, how many and their values do not."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks import check_refine_nm, check_refine_rows


def refine_rows_(
    mask: Tensor,
    weight: Tensor,
    gram: Tensor,
    damping: float = 0.3,
    most_swaps: int | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Swap pruned weights of a row for kept ones, as long as that makes the layer's error smaller; ``mask`` in place.

    A row's error is ``p @ G @ p``: ``p`` its pruned weights, 0 elsewhere, and ``G = gram + damping * gram.diag()``.
    Greedy: what to un-prune for the least error, then what to prune for it; where that gains nothing, first what to
    prune, then what to un-prune; until neither takes more than 1e-6 of the error away. The lowest column is taken among
    equals. Sums are float64 in a fixed order: the same mask for any number of threads and every instruction set.

    A large damping leaves Wanda's mask as it is. Whatever the damping, from Wanda's mask the layer's own error ``p @
    gram @ p`` becomes smaller, too: of all masks of a row it has the least ``p @ diag(gram) @ p``, so that every swap
    adds to what damping counts.

    Args:
        mask: [C_out, C_in], bool, contiguous, True = pruned.
        weight: [C_out, C_in], float32, bfloat16 or float16: the dense weights, not written.
        gram: [C_in, C_in], float32: X^T X of the layer's inputs X, symmetric (not checked) and finite.
        damping: >= 0; how much a channel's own square counts more than what channels have in common.
        most_swaps: of a row, >= 0. None: C_in // 16, at least 1.
        sums: [C_out, 2], float64, contiguous, or None. Receives each row's error before and after.

    Returns:
        [C_out], int32: the swaps of each row.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.

    Source: SparseSwaps (arXiv 2512.10922).
    """
    return torch.ops.wanda.refine_rows_(mask, weight, gram, damping, most_swaps, sums)


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
    """:func:`refine_rows_` inside groups of ``m`` columns: a mask that keeps ``n`` of every ``m`` goes on doing so.

    A sweep goes over a row's groups in order and makes the best swap of each at once, if it takes more than 1e-6 of the
    row's error away; the lowest pair (what is un-pruned, then what is pruned) is taken among equals.

    Args:
        mask, weight, gram, damping, sums: as there; C_in a multiple of ``m``.
        n: how many of each group are kept, 0 < n < m.
        m: size of a group.
        sweeps: over a row at most, >= 0; a sweep that changes nothing is its last.

    Returns:
        [C_out], int32: the swaps of each row.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.

    Source: SparseSwaps (arXiv 2512.10922).
    """
    return torch.ops.wanda.refine_nm_(mask, weight, gram, n, m, damping, sweeps, sums)


def _swaps(_: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.int32)


fake("refine_rows_", check_refine_rows, _swaps)
fake("refine_nm_", check_refine_nm, _swaps)

"""SparseGPT's solver: columns are pruned from left to right, and what each loses is made up for by those after it.

Source: SparseGPT (arXiv 2301.00774), algorithm 1, with the masks of the official code of Wanda and of its ablation.
Float32 throughout. The weight is kept transposed, so that a column of it is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..threshold import kth_smallest
from .inputs import Factor

# (weights [columns, C_out], their columns) -> scores of the same shape
Score = Callable[[Tensor, slice], Tensor]


def reconstruct_(
    weight: Tensor,
    factor: Factor,
    score: Score,
    sparsity: float,
    pattern: tuple[int, int] | None,
    block_size: int,
    mask: Tensor | None = None,
) -> tuple[float, float]:
    """Prune ``weight``, [C_out, C_in], in place and update what is kept.

    Args:
        factor: of the inputs' Hessian.
        score: what decides, on the weights as they are when their turn comes.
        sparsity: one threshold per block of columns: everything up to the ``int(numel * sparsity)``-th lowest score
            (from 0) goes. Not used with ``pattern`` or ``mask``.
        pattern: (n, m): n of every m consecutive columns are kept.
        block_size: columns updated at once; a multiple of m.
        mask: [C_out, C_in], bool: prune these instead (``ablate_*_seq``).

    Returns:
        The squared output error on the calibration data that the update leaves, and the squared output, in the same
        unit (damping counts as data).
    """
    left = weight.float().t().contiguous()
    left[factor.dead] = 0
    total = float(((factor.hessian @ left) * left).sum(dtype=torch.float64))
    lost = 0.0
    for begin in range(0, left.shape[0], block_size):
        work = left[begin : begin + block_size]
        end = begin + work.shape[0]
        upper = factor.upper[begin:end, begin:end]
        if mask is not None:
            pruned = mask[:, begin:end].t().contiguous()
        elif pattern is None:
            scores = score(work, slice(begin, end))
            pruned = scores <= kth_smallest(scores, int(scores.numel() * sparsity) + 1)
        else:
            pruned = torch.zeros_like(work, dtype=torch.bool)
        errors = torch.empty_like(work)
        for i in range(work.shape[0]):
            if mask is None and pattern is not None and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                scores = score(work[group], slice(begin + i, begin + i + pattern[1]))
                order = torch.sort(scores, dim=0, stable=True).indices
                pruned[group] = torch.zeros_like(pruned[group]).scatter_(0, order[: pattern[1] - pattern[0]], True)
            kept = work[i].masked_fill(pruned[i], 0)
            errors[i] = (work[i] - kept) / upper[i, i]
            work[i] = kept
            work[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        left[end:].addmm_(factor.upper[begin:end, end:].t(), errors, alpha=-1)
        lost += float(errors.square().sum(dtype=torch.float64))
    weight.copy_(left.t())
    return lost, total

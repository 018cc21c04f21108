"""The appendix's variant of Wanda: each row loses the weights that carry the least of its score, not a fixed number."""

from __future__ import annotations

import torch
from torch import Tensor

BEGIN, HIGHEST = 0.4, 0.8
TOLERANCE = 0.001


def variant_mask(score: Tensor, sparsity: float) -> Tensor:
    """Per row the largest set of low scores whose sum stays under alpha times the row's sum, with one alpha for the
    matrix by bisection in [0, 0.8], until the share pruned is within 0.001 of ``sparsity``.

    A row where not even its lowest score stays under it loses all of it, as in the official code, whose index -1 is
    the row's largest score.

    Args:
        score: [C_out, C_in], float32, >= 0.

    Returns:
        [C_out, C_in], bool, True = pruned.

    Source: Wanda (arXiv 2306.11695), appendix ("use_variant" of the official code).
    """
    ordered = torch.sort(score, dim=1, stable=True).values
    cumulated = ordered.cumsum(dim=1)
    row_sum = score.sum(dim=1, keepdim=True)

    def mask_of(alpha: float) -> tuple[Tensor, float]:
        last = (cumulated <= row_sum * alpha).sum(dim=1, keepdim=True) - 1
        mask = score <= ordered.gather(1, last % score.shape[1])
        return mask, int(mask.sum()) / mask.numel()

    low, high, alpha = 0.0, HIGHEST, BEGIN
    mask, share = mask_of(alpha)
    while abs(share - sparsity) > TOLERANCE and high - low >= TOLERANCE:
        if share > sparsity:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        mask, share = mask_of(alpha)
    return mask

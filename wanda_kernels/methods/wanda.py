"""Wanda: ``|W| * ||X_j||_2`` within each row, and the appendix's variant.

Source: Wanda (arXiv 2306.11695), eq. 1, algorithm 1 and appendix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Method, Needs, Outcome, Pattern, option
from .inputs import LayerInputs
from .select import GROUP, Group, prune_independent_rows_, prune_masked_

BEGIN, HIGHEST = 0.4, 0.8
TOLERANCE = 0.001


def wanda_score(weight: Tensor, norm: Tensor) -> Tensor:
    """``|W| * ||X_j||_2``, float32, >= 0. Source: Wanda (arXiv 2306.11695), eq. 1."""
    return weight.float().abs() * norm


@dataclass(frozen=True)
class Wanda(Method):
    """``group``: what weights are compared with; ``variant``: the appendix's; rows of any sparsity."""

    name = "wanda"
    needs = Needs.NORM
    takes_experts = True

    group: Group | None = option(None, **GROUP)
    variant: bool = option(False, "wanda: the paper's appendix; rows of any sparsity.", sparsity_only=True)

    def has_independent_rows(self, pattern: Pattern | None) -> bool:
        return not self.variant and self.group in (None, Group("row"))

    def check(self, pattern: Pattern | None) -> None:
        super().check(pattern)
        if self.variant and self.group is not None:
            raise ValueError("variant chooses within each row by itself: give variant or group, not both")

    def prune_(self, weight: Tensor, inputs: LayerInputs | None, sparsity: float, pattern: Pattern | None) -> Outcome:
        assert inputs is not None
        if self.has_independent_rows(pattern):
            return prune_independent_rows_(weight, inputs.norm, sparsity, pattern)
        score = wanda_score(weight, inputs.norm)
        mask = variant_mask(score, sparsity) if self.variant else (self.group or Group("row")).mask(score, sparsity)
        return prune_masked_(weight, score, mask)


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

"""Magnitude pruning: ``|W|``, with one threshold per matrix as the official code of Wanda has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Method, Needs, Outcome, Pattern, option
from .inputs import LayerInputs
from .select import GROUP, Group, kth_smallest, prune_independent_rows_, prune_masked_

_ROWS = 256  # at a time


def magnitude_score(weight: Tensor) -> Tensor:
    """``|W|``, float32."""
    return weight.float().abs()


@dataclass(frozen=True)
class Magnitude(Method):
    """``group``: what weights are compared with; the matrix where it is None."""

    name = "magnitude"
    needs = Needs.NOTHING
    takes_experts = True

    group: Group | None = option(None, **GROUP)

    def has_independent_rows(self, pattern: Pattern | None) -> bool:
        return pattern is not None

    def prune_(self, weight: Tensor, inputs: LayerInputs | None, sparsity: float, pattern: Pattern | None) -> Outcome:
        if pattern is not None:
            return prune_independent_rows_(weight, None, sparsity, pattern)
        if self.group is None:
            return _prune_with_one_threshold_(weight, sparsity)
        score = magnitude_score(weight)
        return prune_masked_(weight, score, self.group.mask(score, sparsity))


def _prune_with_one_threshold_(weight: Tensor, sparsity: float) -> Outcome:
    """As the official ``prune_magnitude``: the ``int(numel * s)``-th smallest ``|W|`` (from 0), and everything up to it
    goes."""
    magnitude = weight.abs()
    mask = magnitude <= kth_smallest(magnitude, int(weight.numel() * sparsity) + 1)
    pruned, total = torch.zeros(2, dtype=torch.float64, device=weight.device).unbind()
    for part, gone in zip(magnitude.split(_ROWS), mask.split(_ROWS), strict=True):  # in caches, and little memory
        squares = part.float().square()
        total += squares.sum(dtype=torch.float64)
        pruned += squares.masked_fill_(~gone, 0).sum(dtype=torch.float64)
    weight.masked_fill_(mask, 0)
    return Outcome.of(float(pruned), float(total))

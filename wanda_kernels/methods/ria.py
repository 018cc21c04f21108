"""RIA: relative importance and activations, with one threshold per matrix.

Source: RIA (ICLR 2024, Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method").
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Method, Needs, Outcome, Pattern, option
from .inputs import LayerInputs
from .select import GROUP, Group, prune_masked_


@dataclass(frozen=True)
class Ria(Method):
    """``group``: what weights are compared with; the matrix where it is None, as in the official code. ``ria_power``:
    exponent of the norm."""

    name = "ria"
    needs = Needs.NORM
    baseline = "wanda"

    group: Group | None = option(None, **GROUP)
    ria_power: float = option(0.5, "ria: exponent of the norm. \\[default: 0.5]")

    def check(self, pattern: Pattern | None) -> None:
        super().check(pattern)
        if not 0 <= self.ria_power <= 10:
            raise ValueError(f"ria_power must be in [0, 10], got {self.ria_power}")

    def prune_(self, weight: Tensor, inputs: LayerInputs | None, sparsity: float, pattern: Pattern | None) -> Outcome:
        assert inputs is not None
        score = ria_score(weight, inputs.norm, self.ria_power)
        return prune_masked_(weight, score, (self.group or Group("layer")).mask(score, sparsity, pattern))


def ria_score(weight: Tensor, norm: Tensor, power: float) -> Tensor:
    """``(|W| / sum of its column + |W| / sum of its row) * norm^power``. Sums of 0 belong to weights of 0, whose score
    is 0."""
    magnitude = weight.float().abs()
    by_column = magnitude / magnitude.sum(dim=0).clamp_min_(1e-38)
    by_row = magnitude / magnitude.sum(dim=1, keepdim=True).clamp_min_(1e-38)
    return (by_column + by_row) * norm**power

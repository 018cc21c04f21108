"""OWL: blocks with more outliers keep more weights; the mean over blocks stays what was asked for.

Source: OWL (arXiv 2310.05175, Yin et al.), layerwise outlier distribution, as its official code computes it; where
blocks are of different sizes (experts in some), the mean is over weights, so that the model has the sparsity asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import LayerInputs
from .wanda import wanda_score


@dataclass(frozen=True)
class Owl:
    """``limit`` (the paper's lambda): the densities of any two blocks differ by at most twice this. ``outlier`` (M): a
    score this many times the block's mean is an outlier."""

    limit: float = 0.08
    outlier: float = 5.0

    def check(self, sparsity: float) -> None:
        if not 0 < self.limit < 0.5:
            raise ValueError(f"owl's limit must be in (0, 0.5), got {self.limit}")
        if not self.outlier > 0:
            raise ValueError(f"owl's outlier must be above 0, got {self.outlier}")
        if not 2 * self.limit <= sparsity < 1 - 2 * self.limit:
            raise ValueError(
                f"owl may move a block's sparsity by {2 * self.limit:g}: sparsity must be in "
                f"[{2 * self.limit:g}, {1 - 2 * self.limit:g}), got {sparsity:g}"
            )

    def sparsities(self, ratios: Sequence[float], sparsity: float, sizes: Sequence[int] | None = None) -> list[float]:
        """Outlier ratios -> a sparsity for each block, with the mean ``sparsity`` over their weights.

        Args:
            sizes: of the blocks, in weights; None: all alike, as the official code has it.
        """
        lowest, spread = min(ratios), max(ratios) - min(ratios)
        if spread == 0:
            return [sparsity] * len(ratios)
        density = [(ratio - lowest) / spread * 2 * self.limit for ratio in ratios]
        shares = [1.0] * len(ratios) if sizes is None else [size / max(sizes) for size in sizes]
        mean = sum(one * share for one, share in zip(density, shares, strict=True)) / sum(shares)
        return [sparsity - (one - mean) for one in density]


def outlier_ratio(weights: dict[str, Tensor], inputs: dict[str, LayerInputs], outlier: float) -> float:
    """The share of a block's Wanda scores above ``outlier`` times their mean, over all its layers together."""
    scores = [wanda_score(weight, inputs[name].norm.unsqueeze(-2)) for name, weight in weights.items()]
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > outlier * mean).sum()) for score in scores) / count

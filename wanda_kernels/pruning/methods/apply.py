"""Prunes one linear layer by any method."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...ops import nm_mask
from .groups import Group
from .inputs import LayerInputs
from .scores import magnitude_score, ria_score, sparsegpt_score, wanda_score
from .sparsegpt import Score, reconstruct_
from .variant import variant_mask

if TYPE_CHECKING:
    from ..selection import Target


class Outcome(NamedTuple):
    """``pruned``, ``total``: what was lost and what there was, as sums of squares whose ratio is the estimated error
    squared. ``damping``: of the Hessian, where there was one; more than asked for where the factorisation failed."""

    pruned: float
    total: float
    damping: float | None = None


def prune_layer_(weight: Tensor, inputs: LayerInputs | None, target: Target) -> Outcome:
    """Prune ``weight``, [C_out, C_in], in place. ``inputs`` may be None for magnitude alone."""
    from ..selection import prune_weight_

    options = target.options
    if target.sparsity == 0:
        return Outcome(0.0, 1.0)
    if target.method.startswith("ablate") or (target.method == "sparsegpt" and options.weight_update):
        return _reconstruct_layer_(weight, _known(inputs), target)
    if target.method == "magnitude" and options.group is None:
        return Outcome(*prune_weight_(weight, None, target))
    if target.method == "wanda" and not options.variant and options.group in (None, Group("row")):
        return Outcome(*prune_weight_(weight, _known(inputs).norm, target))
    score, damping = _score(weight, inputs, target)
    mask = _mask(score, target)
    pruned = float(score.masked_fill(~mask, 0).square().sum(dtype=torch.float64))
    total = float(score.square().sum(dtype=torch.float64))
    weight.masked_fill_(mask, 0)
    return Outcome(pruned, total, damping)


def _known(inputs: LayerInputs | None) -> LayerInputs:
    if inputs is None:
        raise ValueError("the method needs statistics of the layer's inputs")
    return inputs


def _score(weight: Tensor, inputs: LayerInputs | None, target: Target) -> tuple[Tensor, float | None]:
    """Scores whose squares add up to an error, and the damping."""
    if target.method == "magnitude":
        return magnitude_score(weight), None
    inputs = _known(inputs)
    if target.method == "wanda":
        return wanda_score(weight, inputs.norm), None
    if target.method == "ria":
        return ria_score(weight, inputs.norm, target.options.ria_power), None
    factor = inputs.factor(target.options.damping)
    # the root has the order of W^2 / d^2, which the official code compares, but for the rounding of equals
    return sparsegpt_score(weight, factor.upper.diagonal()).sqrt_(), factor.damping


def _mask(score: Tensor, target: Target) -> Tensor:
    if target.pattern is not None:
        ones = torch.ones(score.shape[1], dtype=torch.float32, device=score.device)
        return nm_mask(score, ones, target.pattern.n, target.pattern.m)
    if target.options.variant:
        return variant_mask(score, target.sparsity)
    # RIA's official code compares the whole matrix
    group = target.options.group or Group("layer" if target.method == "ria" else "row")
    return group.mask(score, target.sparsity)


def _reconstruct_layer_(weight: Tensor, inputs: LayerInputs, target: Target) -> Outcome:
    factor = inputs.factor(target.options.damping)
    diagonal = factor.upper.diagonal().unsqueeze(1)
    norm = inputs.norm.unsqueeze(1)
    scores: dict[str, Callable[[Tensor, slice], Tensor]] = {
        "sparsegpt": lambda work, columns: sparsegpt_score(work, diagonal[columns]),
        "mag": lambda work, columns: magnitude_score(work),
        "wanda": lambda work, columns: wanda_score(work, norm[columns]),
    }
    metric = target.method.split("_")[1] if target.method.startswith("ablate") else "sparsegpt"
    score: Score = scores[metric]
    pattern = (target.pattern.n, target.pattern.m) if target.pattern else None
    mask = _sequential_mask(weight, inputs.norm, metric, target) if target.method.endswith("_seq") else None
    options = target.options
    lost, total = reconstruct_(weight, factor, score, target.sparsity, pattern, options.block_size, mask)
    return Outcome(lost, total, factor.damping)


def _sequential_mask(weight: Tensor, norm: Tensor, metric: str, target: Target) -> Tensor:
    """The mask that Wanda or magnitude pruning gives by itself."""
    from ..selection import prune_weight_

    alone = weight.clone()
    prune_weight_(alone, norm if metric == "wanda" else None, target)
    return alone == 0

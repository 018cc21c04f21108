"""Row selection in plain PyTorch (Wanda, section 3, eq. 1, compared per output row)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_norm, check_score_sums, check_sparsity, check_weight


def scores(weight: Tensor, norm: Tensor) -> Tensor:
    """``|W| * norm`` in float32: one multiplication, rounded to nearest."""
    return weight.abs().float() * norm


def write_score_sums(score: Tensor, mask: Tensor, score_sums: Tensor) -> None:
    """Per row: sum of the squared scores that are pruned, and of all."""
    squares = score.square()
    score_sums[:, 0] = squares.masked_fill(~mask, 0).sum(dim=1)
    score_sums[:, 1] = squares.sum(dim=1)


def _mask(op: str, weight: Tensor, norm: Tensor, sparsity: float) -> Tensor:
    check_weight(op, weight)
    check_norm(op, norm, weight)
    check_sparsity(op, sparsity)
    score = scores(weight, norm)
    k = int(weight.shape[1] * sparsity)
    pruned = torch.sort(score, dim=1, stable=True).indices[:, :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, pruned, True)


def row_mask(weight: Tensor, norm: Tensor, sparsity: float) -> Tensor:
    return _mask("row_mask", weight, norm, sparsity)


def prune_rows_(weight: Tensor, norm: Tensor, sparsity: float, score_sums: Tensor | None = None) -> None:
    mask = _mask("prune_rows_", weight, norm, sparsity)
    if score_sums is not None:
        check_score_sums("prune_rows_", score_sums, weight)
        write_score_sums(scores(weight, norm), mask, score_sums)
    weight.masked_fill_(mask, 0)

"""N:M selection in plain PyTorch (Wanda, section 3.1: N of every M consecutive inputs are kept)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_norm, check_pattern, check_score_sums, check_weight
from .rows import scores, write_score_sums


def _mask(op: str, weight: Tensor, norm: Tensor, n: int, m: int) -> Tensor:
    check_weight(op, weight)
    check_norm(op, norm, weight)
    check_pattern(op, weight, n, m)
    groups = scores(weight, norm).reshape(weight.shape[0], weight.shape[1] // m, m)
    pruned = torch.sort(groups, dim=2, stable=True).indices[..., : m - n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, pruned, True).view(weight.shape)


def nm_mask(weight: Tensor, norm: Tensor, n: int, m: int) -> Tensor:
    return _mask("nm_mask", weight, norm, n, m)


def prune_nm_(weight: Tensor, norm: Tensor, n: int, m: int, score_sums: Tensor | None = None) -> None:
    mask = _mask("prune_nm_", weight, norm, n, m)
    if score_sums is not None:
        check_score_sums("prune_nm_", score_sums, weight)
        write_score_sums(scores(weight, norm), mask, score_sums)
    weight.masked_fill_(mask, 0)

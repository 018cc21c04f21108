"""Pruning metrics: a score for each weight, [C_out, C_in], float32, >= 0."""

from __future__ import annotations

from torch import Tensor


def wanda_score(weight: Tensor, norm: Tensor) -> Tensor:
    """``|W| * ||X_j||_2``. Source: Wanda (arXiv 2306.11695), eq. 1."""
    return weight.float().abs() * norm


def magnitude_score(weight: Tensor) -> Tensor:
    """``|W|``."""
    return weight.float().abs()


def sparsegpt_score(weight: Tensor, diagonal: Tensor) -> Tensor:
    """``W^2 / d_j^2``, d the diagonal of the upper Cholesky factor of the damped inverse Hessian: what the official
    code compares. Source: SparseGPT (arXiv 2301.00774), section 3."""
    return weight.float().square() / diagonal.square()


def ria_score(weight: Tensor, norm: Tensor, power: float) -> Tensor:
    """``(|W| / sum of its column + |W| / sum of its row) * norm^power``. Source: RIA (ICLR 2024, Zhang et al.,
    "Plug-and-Play"), relative importance and activations. Sums of 0 belong to weights of 0, whose score is 0."""
    magnitude = weight.float().abs()
    by_column = magnitude / magnitude.sum(dim=0).clamp_min_(1e-38)
    by_row = magnitude / magnitude.sum(dim=1, keepdim=True).clamp_min_(1e-38)
    return (by_column + by_row) * norm**power

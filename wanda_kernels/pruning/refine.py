"""A better mask for the same weights: after any method that leaves the weights as they are.

Source: SparseSwaps (arXiv 2512.10922); the operators are :mod:`wanda_kernels.ops.refine`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods import LayerInputs, Pattern
from ..ops import refine_nm_, refine_rows_


def refine_(weight: Tensor, dense: Tensor, inputs: LayerInputs, pattern: Pattern | None, damping: float) -> int:
    """Prune other weights of ``weight``, [C_out, C_in], where that makes the layer's error smaller, as many of each row
    or group; what is kept is as in ``dense``. Returns how many were swapped."""
    assert inputs.hessian is not None  # 2 / sequences * X^T X: the factor changes no mask
    if pattern is None:
        mask = (weight == 0).contiguous()
        swaps = refine_rows_(mask, dense, inputs.hessian, damping)
    else:
        mask = mask_of_groups(weight, dense, pattern).contiguous()
        swaps = refine_nm_(mask, dense, inputs.hessian, pattern.n, pattern.m, damping)
    weight.copy_(dense.masked_fill(mask, 0))
    return int(swaps.sum())


def mask_of_groups(weight: Tensor, dense: Tensor, pattern: Pattern) -> Tensor:
    """[C_out, C_in] bool: m - n pruned of every m; where the dense weight has zeros, more are 0."""
    is_zero = weight == 0
    order = torch.where(is_zero & (dense != 0), 0, torch.where(is_zero, 1, 2)).unflatten(1, (-1, pattern.m))
    pruned = torch.sort(order, dim=2, stable=True).indices[..., : pattern.m - pattern.n]
    return torch.zeros(order.shape, dtype=torch.bool, device=weight.device).scatter_(2, pruned, True).flatten(1)


def sum_over_experts(difference: Tensor, inputs: LayerInputs) -> float:
    """The sum over rows of ``d @ H @ d``, H the inputs' Hessian: ||X D^T||^2 up to its factor. ``difference``: [C_out,
    C_in], or [E, C_out, C_in]."""
    assert inputs.hessian is not None
    if difference.dim() == 3:
        return sum(sum_over_experts(one, inputs.of_expert(expert)) for expert, one in enumerate(difference))
    rows = difference.float()
    return float(((rows @ inputs.hessian) * rows).sum(dtype=torch.float64))

"""A better mask for the same weights, then better weights on that mask: after any method that leaves the weights as
they are. Then, after any method, weights of 4 bits.

Sources: SparseSwaps (arXiv 2512.10922), :mod:`wanda_kernels.ops.refine`; ALPS (arXiv 2406.07831),
:mod:`wanda_kernels.ops.solve`; QuantEase (arXiv 2309.01885), :mod:`wanda_kernels.packed.calibrated`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods import LayerInputs, Pattern
from ..ops import calibrate_levels_, refine_nm_, refine_rows_, solve_rows_
from ..ops.solve import rows_of_tile
from ..packed.calibrated import quantize_rows
from ..packed.values import ValueType, dequantize
from .spec import PruneSpec
from .stopwatch import Stopwatch

# Of each row: a count, errors, the square of its outputs
FOUND = ("swaps", "method", "refined", "updated", "quantized", "dense")


def improve_(
    weight: Tensor,
    dense: Tensor,
    inputs: LayerInputs,
    spec: PruneSpec,
    stopwatch: Stopwatch,
    values: ValueType | None = None,
) -> Tensor:
    """Prune other weights of ``weight``, [C_out, C_in], as many of each row or group, then change what is kept, both as
    far as ``spec`` says and where it makes the layer's error smaller; then round it to ``values``.

    Args:
        weight: pruned; with ``refine`` or ``update`` what is kept is as in ``dense``. Of a larger matrix, whole tiles
            (``ops.solve.rows_of_tile``).
        values: what it is rounded to, each level times its scale rounded to the weight's dtype; None: it is not.

    Returns:
        [C_out, 6], float64, see ``FOUND``: swaps; the error ``d @ H @ d`` with H the inputs' Hessian, as it was, with
        the refined mask, with the updated weights and with the rounded ones, where there are; ``w @ H @ w`` of the
        dense weights w.
    """
    assert inputs.hessian is not None  # 2 / sequences * X^T X: the factor changes no mask and no weight
    hessian, pattern, rows = inputs.hessian, spec.pattern, len(weight)
    found = torch.zeros(rows, len(FOUND), dtype=torch.float64, device=weight.device)
    sums = found.new_empty(rows, 2)  # with damping: what it has added is taken out again

    with stopwatch.measure("refinement" if spec.refine else "update" if spec.update else "quantisation"):
        found[:, 5] = errors(dense, hessian)
        if spec.refine or spec.update:
            mask = (weight == 0 if pattern is None else mask_of_groups(weight, dense, pattern)).contiguous()
            squares = own_errors(weight, dense, hessian)
        else:
            found[:, 1] = errors(weight.float() - dense.float(), hessian)
    if spec.refine:
        with stopwatch.measure("refinement"):
            if pattern is None:
                found[:, 0] = refine_rows_(mask, dense, hessian, spec.refine_damping, None, sums)
            else:
                found[:, 0] = refine_nm_(mask, dense, hessian, pattern.n, pattern.m, spec.refine_damping, sums=sums)
            weight.copy_(dense.masked_fill(mask, 0))
            found[:, 1] = sums[:, 0] - spec.refine_damping * squares
            squares = own_errors(weight, dense, hessian)
            found[:, 2] = sums[:, 1] - spec.refine_damping * squares
    if spec.update:
        with stopwatch.measure("update"):
            solve_rows_(weight, mask, hessian, dense, spec.update_damping, spec.update_steps, sums)
            if not spec.refine:
                found[:, 1] = sums[:, 0] - spec.update_damping * squares
            # By differences, so that rows that did not change have the error that they had, whatever the damping
            gain = sums[:, 0] - sums[:, 1] - spec.update_damping * (squares - own_errors(weight, dense, hessian))
            found[:, 3] = found[:, 2 if spec.refine else 1] - gain
    if values is not None:
        with stopwatch.measure("quantisation"):
            weight.copy_(dequantize(*quantize_rows(weight, values, hessian), values))
            found[:, 4] = errors(weight.float() - dense.float(), hessian)
    return found


def errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """``d @ H @ d`` of each row d of ``difference``: [C_out], float64."""
    found = torch.empty(len(difference), dtype=torch.float64, device=difference.device)
    levels = torch.zeros(difference.shape, dtype=torch.int8, device=difference.device)  # all of d is an error
    scales = torch.ones(len(difference), 1, dtype=torch.bfloat16, device=difference.device)
    calibrate_levels_(levels, difference, scales, hessian, 8, 0.0, 0, found)  # half of a product
    return found


def own_errors(weight: Tensor, dense: Tensor, hessian: Tensor) -> Tensor:
    """Of each row what its columns' errors are by themselves, which damping counts: [C_out], float64."""
    diagonal, tile = hessian.diagonal().double(), rows_of_tile(weight.device)  # a tile's float64 stays in a cache
    parts = zip(dense.split(tile), weight.split(tile), strict=True)
    return torch.cat([torch.sub(one.double(), other).square_().mul_(diagonal).sum(dim=1) for one, other in parts])


def mask_of_groups(weight: Tensor, dense: Tensor, pattern: Pattern) -> Tensor:
    """[C_out, C_in] bool: m - n pruned of every m; where the dense weight has zeros, more are 0."""
    is_zero = weight == 0
    order = torch.where(is_zero & (dense != 0), 0, torch.where(is_zero, 1, 2)).unflatten(1, (-1, pattern.m))
    pruned = torch.sort(order, dim=2, stable=True).indices[..., : pattern.m - pattern.n]
    return torch.zeros(order.shape, dtype=torch.bool, device=weight.device).scatter_(2, pruned, True).flatten(1)

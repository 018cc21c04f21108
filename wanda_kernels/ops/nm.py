"""N:M selection: n of every m consecutive inputs are kept (Wanda, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import fake
from .._checks import check_nm


def prune_nm_(weight: Tensor, norm: Tensor, n: int, m: int, score_sums: Tensor | None = None) -> None:
    """Keep the ``n`` weights of every ``m`` consecutive columns with the largest ``|W| * norm``, in place.

    Equivalent to::

        groups = (weight.abs().float() * norm).view(C_out, -1, m)  # of a matrix
        pruned = torch.sort(groups, dim=2, stable=True).indices[..., : m - n]
        weight.view(C_out, -1, m).scatter_(2, pruned, 0)

    Among equal scores the lowest column is pruned first; NaN counts as the largest score.

    Args:
        weight: [C_out, C_in] or [E, C_out, C_in], float32, bfloat16 or float16, C_in a multiple of ``m``; else as
            in :func:`prune_rows_`.
        norm: [C_in] or [E, C_in], float32, on the same device.
        n: how many of each group are kept, 0 < n < m.
        m: size of a group.
        score_sums: as in :func:`prune_rows_`.

    Raises:
        ValueError, TypeError: naming the argument, what is required and what came.

    Source: Wanda (arXiv 2306.11695), section 3.1 (structured N:M sparsity).
    """
    torch.ops.wanda.prune_nm_(weight, norm, n, m, score_sums)


def nm_mask(weight: Tensor, norm: Tensor, n: int, m: int) -> Tensor:
    """The mask of :func:`prune_nm_`: the shape of ``weight``, bool, True = pruned. ``weight`` is not written."""
    return torch.ops.wanda.nm_mask(weight, norm, n, m)


fake("prune_nm_", check_nm)
fake("nm_mask", check_nm, lambda weight, *_: weight.new_empty(weight.shape, dtype=torch.bool))

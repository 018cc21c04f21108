"""How scores become zeros: by the row operators, in comparison groups, or with one threshold for a matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import nm_mask, prune_nm_, prune_rows_, row_mask
from .base import Outcome, Pattern


def prune_independent_rows_(weight: Tensor, norm: Tensor | None, sparsity: float, pattern: Pattern | None) -> Outcome:
    """Prune by ``|W| * norm`` within each row (or by ``|W|``: ``norm`` None), in one pass over memory: a matrix
    [C_out, C_in], or those of experts [E, C_out, C_in]."""
    if norm is None:
        norm = torch.ones(*weight.shape[:-2], weight.shape[-1], dtype=torch.float32, device=weight.device)
    sums = torch.empty(*weight.shape[:-1], 2, dtype=torch.float32, device=weight.device)
    if pattern is not None:
        prune_nm_(weight, norm, pattern.n, pattern.m, sums)
    else:
        prune_rows_(weight, norm, sparsity, sums)
    return Outcome(sums.view(-1, 2))


def prune_masked_(weight: Tensor, score: Tensor, mask: Tensor, damping: float | None = None) -> Outcome:
    """Prune where ``mask`` is True; ``score``, float32, says what is lost."""
    pruned = float(score.masked_fill(~mask, 0).square().sum(dtype=torch.float64))
    total = float(score.square().sum(dtype=torch.float64))
    weight.masked_fill_(mask, 0)
    return Outcome.of(pruned, total, damping)


@dataclass(frozen=True)
class Group:
    """Which weights compete with each other (Wanda, ablation of the pruning configuration).

    ``row``: an output row ((output, 1) in the paper), ``column``: an input column ((input, 1)), ``layer``: the whole
    matrix. ``width``: so many neighbouring rows or columns are one group ((output, 128) is ``row:128``)."""

    axis: str
    width: int = 1

    @classmethod
    def parse(cls, text: str) -> Group:
        match = re.fullmatch(r"(row|layer|column)(?::([1-9]\d*))?", text.strip())
        if not match or (match[1] == "layer" and match[2]):
            raise ValueError(f"group must be row, layer or column, or row:N or column:N, got '{text}'")
        return cls(match[1], int(match[2] or 1))

    def __str__(self) -> str:
        return self.axis if self.width == 1 else f"{self.axis}:{self.width}"

    def mask(self, score: Tensor, sparsity: float, pattern: Pattern | None = None) -> Tensor:
        """The ``int(size of the group * sparsity)`` lowest scores of each group, or what an N:M ``pattern`` leaves out;
        among equals the lowest index first.

        Args:
            score: [C_out, C_in], float32, >= 0.

        Returns:
            [C_out, C_in], bool, True = pruned.
        """
        if pattern is not None:
            ones = torch.ones(score.shape[1], dtype=torch.float32, device=score.device)
            return nm_mask(score, ones, pattern.n, pattern.m)
        if self.axis == "layer":
            return _flat_mask(score, sparsity)
        if self.width == 1:
            return _rows(score, sparsity) if self.axis == "row" else _rows(score.t().contiguous(), sparsity).t()
        dim = 0 if self.axis == "row" else 1
        return torch.cat([_flat_mask(part, sparsity) for part in score.split(self.width, dim)], dim)


# The option of methods that compare in groups: ``group: Group | None = option(None, **GROUP)``
GROUP: dict[str, Any] = {
    "help": "What weights are compared with (row:N, column:N: N neighbours together). \\[default: the method's own: "
    "row for wanda, layer for magnitude and ria]",
    "sparsity_only": True,
    "parse": Group.parse,
    "metavar": "row|layer|column",
}


def _rows(score: Tensor, sparsity: float) -> Tensor:
    ones = torch.ones(score.shape[1], dtype=torch.float32, device=score.device)
    return row_mask(score, ones, sparsity)


def _flat_mask(score: Tensor, sparsity: float) -> Tensor:
    """One group, its elements in row-major order."""
    return _rows(score.reshape(1, -1), sparsity).view(score.shape)


def kth_smallest(values: Tensor, rank: int) -> Tensor:
    """The ``rank``-th smallest (from 1) of non-negative values; NaN counts as the largest.

    By counting the upper 15 bits, which order as the values do; float32 then looks among those that share them. On the
    CPU 4 (float32) to 30 (float16) times as fast as ``torch.kthvalue``, with as many bytes for the counts' input.

    Args:
        values: any shape; float32, bfloat16 or float16; no sign bit but a NaN's.

    Returns:
        A scalar tensor of their dtype.
    """
    flat = values.flatten()
    upper = flat.view(torch.int16) if flat.element_size() == 2 else flat.view(torch.int32) >> 16
    keys = upper & 0x7FFF
    ends = torch.bincount(keys, minlength=1 << 15).cumsum(0)
    key = int(torch.searchsorted(ends, rank))
    inside = flat[keys == key]
    return inside.kthvalue(rank - (int(ends[key - 1]) if key else 0)).values

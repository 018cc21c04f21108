"""Comparison groups: which weights compete with each other (Wanda, ablation of the pruning configuration)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import row_mask

AXES = ("row", "layer", "column")


@dataclass(frozen=True)
class Group:
    """``row``: an output row ((output, 1) in the paper), ``column``: an input column ((input, 1)), ``layer``: the
    whole matrix. ``width``: so many neighbouring rows or columns are one group ((output, 128) is ``row:128``)."""

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

    def mask(self, score: Tensor, sparsity: float) -> Tensor:
        """The ``int(size of the group * sparsity)`` lowest scores of each group; among equals the lowest index first.

        Args:
            score: [C_out, C_in], float32, >= 0.

        Returns:
            [C_out, C_in], bool, True = pruned.
        """
        if self.axis == "layer":
            return _flat_mask(score, sparsity)
        if self.width == 1:
            return _rows(score, sparsity) if self.axis == "row" else _rows(score.t().contiguous(), sparsity).t()
        dim = 0 if self.axis == "row" else 1
        return torch.cat([_flat_mask(part, sparsity) for part in score.split(self.width, dim)], dim)


def _rows(score: Tensor, sparsity: float) -> Tensor:
    ones = torch.ones(score.shape[1], dtype=torch.float32, device=score.device)
    return row_mask(score, ones, sparsity)


def _flat_mask(score: Tensor, sparsity: float) -> Tensor:
    """One group, its elements in row-major order."""
    return _rows(score.reshape(1, -1), sparsity).view(score.shape)

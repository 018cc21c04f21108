"""What to prune: the target (sparsity or N:M pattern), the method, and the operator that serves them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch import Tensor

from .._words import percent
from ..ops import prune_nm_, prune_rows_
from .methods.options import ABLATIONS, METHODS, MethodOptions, OptionArguments
from .threshold import kth_smallest

_ROWS = 256  # at a time


@dataclass(frozen=True)
class Pattern:
    """N:M: ``n`` of every ``m`` consecutive inputs are kept."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(f"pattern must be N:M with 0 < N < M, for instance 2:4, got '{text}'")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Target:
    """How much to prune: a share of each row (``sparsity``), or a ``pattern``; ``method`` scores the weights."""

    method: str
    sparsity: float
    pattern: Pattern | None
    options: MethodOptions = field(default_factory=MethodOptions)

    @classmethod
    def resolve(
        cls,
        method: str,
        sparsity: float | None,
        pattern: str | Pattern | None,
        **arguments: Unpack[OptionArguments],
    ) -> Target:
        """Checks the options together. Neither sparsity nor pattern means a sparsity of 0.5."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got '{method}'")
        if pattern is not None and sparsity is not None:
            raise ValueError(f"give sparsity or pattern, not both: got sparsity {sparsity} and pattern {pattern}")
        if pattern is not None:
            parsed = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
            share = 1 - parsed.n / parsed.m
            return cls(method, share, parsed, MethodOptions.resolve(method, share, parsed.m, arguments))
        sparsity = 0.5 if sparsity is None else float(sparsity)
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
        return cls(method, sparsity, None, MethodOptions.resolve(method, sparsity, None, arguments))

    @property
    def needs_calibration(self) -> bool:
        return self.method != "magnitude" or self.options.owl is not None

    @property
    def needs_hessian(self) -> bool:
        return self.method == "sparsegpt" or self.method in ABLATIONS

    def check(self, name: str, weight: Tensor) -> None:
        """Raises ValueError where the pattern does not fit ``weight``, [C_out, C_in]."""
        if self.pattern is not None and weight.shape[1] % self.pattern.m:
            raise ValueError(
                f"{name} has {weight.shape[1]} input columns, not a multiple of the pattern's M = {self.pattern.m}"
            )

    def __str__(self) -> str:
        return f"{self.method} {self.pattern}" if self.pattern else f"{self.method} {percent(self.sparsity)}"


def prune_weight_(weight: Tensor, norm: Tensor | None, target: Target) -> tuple[float, float]:
    """Prune ``weight`` in place. Returns the sums of the squared scores that were pruned, and of all.

    ``norm`` is None for magnitude, whose scores are ``|W|``.
    """
    if norm is None and target.pattern is None:
        return _prune_magnitude_(weight, target.sparsity)
    pruned, total = row_sums_(weight, norm, target).double().sum(dim=0).tolist()
    return pruned, total


def row_sums_(weight: Tensor, norm: Tensor | None, target: Target) -> Tensor:
    """Prune ``weight``, whose rows are independent of each other, in place. Returns each row's two sums: [C_out, 2],
    float32."""
    if norm is None:
        norm = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    sums = torch.empty(weight.shape[0], 2, dtype=torch.float32, device=weight.device)
    if target.pattern is not None:
        prune_nm_(weight, norm, target.pattern.n, target.pattern.m, sums)
    else:
        prune_rows_(weight, norm, target.sparsity, sums)
    return sums


def _prune_magnitude_(weight: Tensor, sparsity: float) -> tuple[float, float]:
    """One threshold per matrix, as the official ``prune_magnitude`` has it: the ``int(numel * s)``-th smallest
    ``|W|`` (from 0), and everything up to it goes. Sparsity 0 prunes nothing."""
    magnitude = weight.abs()
    if sparsity == 0:
        mask = torch.zeros_like(magnitude, dtype=torch.bool)
    else:
        mask = magnitude <= kth_smallest(magnitude, int(weight.numel() * sparsity) + 1)
    pruned, total = torch.zeros(2, dtype=torch.float64, device=weight.device).unbind()
    for part, gone in zip(magnitude.split(_ROWS), mask.split(_ROWS), strict=True):  # in caches, and little memory
        squares = part.float().square()
        total += squares.sum(dtype=torch.float64)
        pruned += squares.masked_fill_(~gone, 0).sum(dtype=torch.float64)
    weight.masked_fill_(mask, 0)
    return float(pruned), float(total)

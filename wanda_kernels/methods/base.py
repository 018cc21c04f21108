"""What a method is: a frozen dataclass whose fields are its options, with one function that prunes one matrix."""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .inputs import LayerInputs


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


class Needs(IntEnum):
    """What has to be known of a matrix's input; each includes what stands before it."""

    NOTHING = 0
    NORM = 1  # the L2 norm of each channel
    GRAM = 2  # the sum of x^T x: SparseGPT's Hessian


class Outcome(NamedTuple):
    """``sums``: [rows, 2], of what was lost and what there was, as sums of squares whose ratio is the estimated error
    squared; a row for each of the matrix's where they are independent, else one. ``damping``: of the Hessian, where
    there was one; more than asked for where the factorisation failed."""

    sums: Tensor
    damping: float | None = None

    @classmethod
    def of(cls, pruned: float, total: float, damping: float | None = None) -> Outcome:
        return cls(torch.tensor([[pruned, total]], dtype=torch.float64), damping)


@dataclass(frozen=True)
class Method(ABC):
    """One way to prune a matrix. Its options are its fields (see :func:`option`); None given for one is its default.

    A subclass says its ``name``, what it ``needs``, whether its rows are independent, and prunes. :func:`register`
    makes it one that :func:`wanda_kernels.prune` and the command line know.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    baseline: ClassVar[str | None] = None  # the method that a study shows it beside
    takes_experts: ClassVar[bool] = False  # prune_ also takes [E, C_out, C_in] where rows are independent
    update: ClassVar[str | None] = None  # how it updates the baseline's weights, of the paper's ablations

    def has_independent_rows(self, pattern: Pattern | None) -> bool:
        """Whether a matrix's rows can be pruned apart from each other, by several processes."""
        return False

    @property
    def keeps_weights(self) -> bool:
        """Whether what is not pruned stays as it was, so that another mask may follow."""
        return True

    def check(self, pattern: Pattern | None) -> None:
        """Raises ValueError for options that are out of range, or do not go together or with ``pattern``."""
        for one in dataclasses.fields(self):
            if pattern is not None and one.metadata.get("sparsity_only") and getattr(self, one.name):
                raise ValueError(f"{one.name} is for a sparsity, a pattern leaves it no choice: give one of them")

    @abstractmethod
    def prune_(self, weight: Tensor, inputs: LayerInputs | None, sparsity: float, pattern: Pattern | None) -> Outcome:
        """Prune ``weight``, [C_out, C_in], in place: ``pattern``, or the share ``sparsity`` > 0 where it is None.

        Args:
            inputs: what the method ``needs`` to know of them; None where it needs nothing.
        """

    def options(self) -> dict[str, Any]:
        """Those that are not the default, as plain data."""
        given = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        plain = {one.name: one.default for one in dataclasses.fields(self)}
        simple = (bool, int, float, str)
        return {
            name: value if isinstance(value, simple) else str(value)
            for name, value in given.items()
            if value != plain[name]
        }


def option(default: Any, help: str, **more: Any) -> Any:
    """An option of a method. ``help``: on the command line; ``sparsity_only``: it is refused with an N:M pattern;
    ``parse``: makes its value of a text; ``metavar``."""
    return field(default=default, metadata={"help": help, **more})

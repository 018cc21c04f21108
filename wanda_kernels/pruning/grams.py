"""The Gram matrices of a block's distinct inputs, for methods and steps that go by them.

Sums go from sequence to sequence in sample order, as in the official SparseGPT, so that neither batches nor processes
change a bit. A process that is not alone keeps its inputs until all have run; then the sums go from process to process,
in parts: while one adds to a part, the one before it adds to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import GRAM_STEP
from ..ops import add_gram_
from ..ops.gram import mirror_

if TYPE_CHECKING:
    from ..distributed import Processes

PART = 1 << 22  # elements that processes exchange at once: 16 MiB


@dataclass(frozen=True)
class Part:
    """Rows ``first`` to ``stop`` of the matrices ``experts`` of an input."""

    name: str
    experts: range
    first: int
    stop: int

    def view(self, grams: Tensor) -> Tensor:
        """On and below the diagonal: [experts, stop - first, stop]."""
        return grams[self.experts.start : self.experts.stop, self.first : self.stop, : self.stop]


@dataclass(frozen=True)
class Addend:
    """``gram = beta * gram + alpha * x^T x`` for the matrix of ``expert``; ``x``: [tokens, C_in]."""

    expert: int
    x: Tensor
    beta: float
    alpha: float

    def add_to(self, part: Part, sums: Tensor) -> None:
        if self.expert in part.experts:
            x = self.x[:, : part.stop]
            add_gram_(sums[self.expert - part.experts.start], x, self.beta, self.alpha, part.first)


class Grams:
    """2 / samples * X^T X of each distinct input X: the Hessians of SparseGPT.

    Args:
        samples: the number of calibration sequences, over all batches and processes.
        experts_of: an input's number of experts; None where it has none.
        processes: that share the sequences.
    """

    def __init__(
        self, samples: int, experts_of: Callable[[str], int | None], processes: Processes | None = None
    ) -> None:
        self._samples = samples
        self._experts_of = experts_of
        self._processes = processes
        self._sums: dict[str, Tensor] = {}  # [E or 1, C_in, C_in]
        self._waiting: dict[str, list[Addend]] = {}

    def add(self, name: str, x: Tensor, first: int) -> None:
        """``x``: [sequences, tokens, C_in], the samples from ``first`` on. The official code's running mean."""
        for seen, one in enumerate(x, first):
            self._add(name, Addend(0, one, seen / (seen + 1), 2 / (seen + 1)))

    def add_rows(self, name: str, x: Tensor, ends: list[int], experts: range, sequences: int) -> None:
        """``x``: [rows, C_in]: those of each expert, and of it each sequence's, up to ``ends``."""
        self._of(name, x)
        begin = 0
        for segment, end in enumerate(ends):
            if end > begin:
                self._add(name, Addend(experts[segment // sequences], x[begin:end], 1.0, 2 / self._samples))
            begin = end

    def _of(self, name: str, x: Tensor) -> Tensor:
        if name not in self._sums:
            cols = x.shape[-1]
            shape = (self._experts_of(name) or 1, cols, cols)
            self._sums[name] = torch.zeros(shape, dtype=torch.float32, device=x.device)
        return self._sums[name]

    def _add(self, name: str, addend: Addend) -> None:
        sums = self._of(name, addend.x)
        if self._processes is None:
            add_gram_(sums[addend.expert], addend.x, addend.beta, addend.alpha)
        else:  # a copy, as blocks may go on to write in place
            copy = Addend(addend.expert, addend.x.clone(), addend.beta, addend.alpha)
            self._waiting.setdefault(name, []).append(copy)

    def exchange(self) -> None:
        """From process to process, and to all: in step s process r adds to part s - r."""
        processes = self._processes
        assert processes is not None
        shapes = processes.agree_on([[name, *sums.shape[::2]] for name, sums in self._sums.items()])
        for name, count, cols in shapes:
            if name not in self._sums:  # no token of this process's came to it
                self._sums[name] = torch.zeros(count, cols, cols, dtype=torch.float32, device=processes.device)
        parts = [part for name, count, cols in shapes for part in parts_of(name, count, cols)]
        most = max((part.view(self._sums[part.name]).numel() for part in parts), default=0)
        under_way = torch.zeros(processes.size, most, dtype=torch.float32, device=processes.device)
        for step in range(len(parts) + processes.size - 1 if parts else 0):
            at = [step - rank for rank in range(processes.size)]  # the part of each
            mine = at[processes.rank]
            if 0 <= mine < len(parts):
                self._continue(parts[mine], under_way, processes.rank)
            active = [rank if 0 <= part < len(parts) else -1 for rank, part in enumerate(at)]
            processes.exchange_rows_(under_way, [range(max(rank, 0), rank + 1) for rank in active])
            if at[-1] >= 0:
                whole = parts[at[-1]].view(self._sums[parts[at[-1]].name])
                whole.copy_(under_way[-1, : whole.numel()].view(whole.shape))
        self._waiting.clear()

    def _continue(self, part: Part, under_way: Tensor, rank: int) -> None:
        shape = part.view(self._sums[part.name]).shape
        sums = under_way[rank, : shape.numel()].view(shape)
        sums.copy_(under_way[rank - 1, : shape.numel()].view(shape) if rank else torch.zeros_like(sums))
        for addend in self._waiting.get(part.name, []):
            addend.add_to(part, sums)

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Name -> [C_in, C_in], or [E, C_in, C_in] of experts; symmetric. They are the caller's, and no longer here."""
        for name in list(self._sums):
            sums = self._sums.pop(name)
            mirror_(sums)
            yield name, sums if self._experts_of(name) is not None else sums[0]


def parts_of(name: str, count: int, cols: int) -> Iterator[Part]:
    """Of ``count`` matrices of ``cols`` inputs: some whole ones, or blocks of rows of one."""
    together = PART // max(1, cols * cols)
    for expert in range(0, count, max(1, together)):
        rows = cols if together else max(1, PART // cols // GRAM_STEP) * GRAM_STEP
        experts = range(expert, min(expert + max(1, together), count))
        for first in range(0, cols, max(1, rows)):
            yield Part(name, experts, first, min(first + rows, cols))

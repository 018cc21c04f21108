"""The exact relative output error of each pruned layer, on the inputs that its statistics came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear as product

from .matrices import Block, Rows, Watching
from .recording import Call, run_block
from .report import Progress


def exact_errors(
    block: Block, hidden: Iterable[Tensor], calls: Sequence[Call], dense: dict[str, Tensor], progress: Progress
) -> Tensor:
    """||X (W - W')^T||_F^2 and ||X W^T||_F^2, W dense and W' pruned, X from the dense block.

    Runs the block once more with its ``dense`` weights, as they are stored; the pruned ones are back afterwards,
    whatever happens. Of experts, what they get counts.

    Returns:
        [batches, 2 x matrices], float64: both sums of each matrix after each other.
    """
    matrices = block.matrices
    pruned = {name: matrix.stored.data for name, matrix in matrices.items()}
    weights = {
        name: (matrix.view(dense[name] - pruned[name]), matrix.view(dense[name])) for name, matrix in matrices.items()
    }
    sums = _Sums(weights, torch.zeros(len(calls), len(weights), 2, dtype=torch.float64))
    with ExitStack() as afterwards:
        for name, matrix in matrices.items():
            afterwards.callback(setattr, matrix.stored, "data", pruned[name])
            matrix.stored.data = dense[name]
        for batch, (x, call) in enumerate(zip(hidden, calls, strict=True)):
            sums.batch = batch
            with block.watched(Watching(sums, call.sequences)):
                run_block(block, x, call)
            progress.advance()
    return sums.sums.flatten(1)


@dataclass
class _Sums:
    """A watcher that makes the products with both of each matrix's ``weights``: ``sums`` [batches, matrices, 2]."""

    weights: dict[str, tuple[Tensor, Tensor]]
    sums: Tensor
    batch: int = 0

    def __post_init__(self) -> None:
        self._columns = {name: column for column, name in enumerate(self.weights)}

    def _add(self, name: str, x: Tensor, weights: Iterable[Tensor]) -> None:
        for place, weight in enumerate(weights):
            added = product(x, weight).float().square().sum(dtype=torch.float64)
            self.sums[self.batch, self._columns[name], place] += added.cpu()

    def input(self, name: str, x: Tensor) -> None:
        self._add(name, x, self.weights[name])

    def rows(self, name: str, rows: Rows) -> None:
        begin = 0
        for expert, end in zip(rows.experts, rows.ends.view(len(rows.experts), -1)[:, -1].tolist(), strict=True):
            self._add(name, rows.x[begin:end], [weight[expert] for weight in self.weights[name]])
            begin = end

    def all_rows(self, name: str) -> None:
        pass


def mean_threshold(dense: Tensor, pruned: Tensor, norm: Tensor) -> float:
    """The mean over rows of the largest Wanda score ``|W| * norm`` that was pruned; 0 for rows that lost nothing.

    Args:
        dense, pruned: [.., C_out, C_in]. norm: [.., C_in].
    """
    score = dense.float().abs() * norm.unsqueeze(-2)
    return float(score.masked_fill_(pruned != 0, 0).amax(dim=-1).mean())

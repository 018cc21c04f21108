"""The exact relative output error of each pruned layer, on the inputs that its statistics came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear as product

from .blocks import Block, Matrix
from .recording import Call, run_block
from .report import Progress


def exact_errors(
    block: Block, hidden: Iterable[Tensor], calls: Sequence[Call], dense: dict[str, Tensor], progress: Progress
) -> Tensor:
    """||X (W - W')^T||_F^2 and ||X W^T||_F^2, W dense and W' pruned, X from the dense block.

    Runs the block once more with its ``dense`` weights; the pruned ones are back afterwards, whatever happens.

    Returns:
        [batches, 2 x matrices], float64: both sums of each matrix after each other.
    """
    pruned = {name: matrix.weight.data for name, matrix in block.matrices.items()}
    sums = torch.zeros(len(calls), len(pruned), 2, dtype=torch.float64)
    row = 0

    def watch(column: int, name: str, matrix: Matrix):  # type: ignore[no-untyped-def]
        difference = dense[name] - pruned[name]

        def add(x: Tensor) -> None:
            for place, weight in enumerate((difference, dense[name])):
                sums[row, column, place] += product(x, weight).float().square().sum(dtype=torch.float64).cpu()

        return matrix.watch(add)

    handles = [watch(column, name, matrix) for column, (name, matrix) in enumerate(block.matrices.items())]
    try:
        for name, matrix in block.matrices.items():
            matrix.weight.data = dense[name]
        for batch, (x, call) in enumerate(zip(hidden, calls, strict=True)):
            row = batch
            run_block(block, x, call)
            progress.advance()
    finally:
        for handle in handles:
            handle.remove()
        for name, matrix in block.matrices.items():
            matrix.weight.data = pruned[name]
    return sums.flatten(1)


def mean_threshold(dense: Tensor, pruned: Tensor, norm: Tensor) -> float:
    """The mean over rows of the largest Wanda score ``|W| * norm`` that was pruned; 0 for rows that lost nothing."""
    score = dense.float().abs() * norm
    return float(score.masked_fill_(pruned != 0, 0).amax(dim=1).mean())

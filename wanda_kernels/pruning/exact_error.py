"""The exact relative output error of each pruned layer, on the inputs that its statistics came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn.functional import linear as product

from .blocks import Block
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

    def adding(column: int, difference: Tensor, whole: Tensor) -> Callable[[Tensor], None]:
        def add(x: Tensor) -> None:
            for place, weight in enumerate((difference, whole)):
                sums[row, column, place] += product(x, weight).float().square().sum(dtype=torch.float64).cpu()

        return add

    with ExitStack() as hooks:
        for column, (name, matrix) in enumerate(block.matrices.items()):
            hooks.callback(setattr, matrix.weight, "data", pruned[name])
            hooks.enter_context(matrix.watch(adding(column, dense[name] - pruned[name], dense[name])))
            matrix.weight.data = dense[name]
        for batch, (x, call) in enumerate(zip(hidden, calls, strict=True)):
            row = batch
            run_block(block, x, call)
            progress.advance()
    return sums.flatten(1)


def mean_threshold(dense: Tensor, pruned: Tensor, norm: Tensor) -> float:
    """The mean over rows of the largest Wanda score ``|W| * norm`` that was pruned; 0 for rows that lost nothing."""
    score = dense.float().abs() * norm
    return float(score.masked_fill_(pruned != 0, 0).amax(dim=1).mean())

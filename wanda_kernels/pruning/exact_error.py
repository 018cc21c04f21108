"""The exact relative output error of each pruned layer, on the inputs that its statistics came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from .blocks import Block
from .progress import Progress
from .recording import Call, run_block
from .report import relative_error


def exact_errors(
    block: Block, hidden: Iterable[Tensor], calls: Sequence[Call], dense: dict[str, Tensor], progress: Progress
) -> dict[str, float]:
    """||X (W - W')^T||_F / ||X W^T||_F by layer name, W dense and W' pruned, X from the dense block.

    Runs the block once more with its ``dense`` weights; the pruned ones are back afterwards, whatever happens.
    """
    pruned = {name: linear.weight.data for name, linear in block.linears.items()}
    lost = dict.fromkeys(pruned, 0.0)
    whole = dict.fromkeys(pruned, 0.0)

    def watch(name: str, linear: nn.Linear):  # type: ignore[no-untyped-def]
        difference = dense[name] - pruned[name]

        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            lost[name] += float(product(inputs[0], difference).float().square().sum(dtype=torch.float64))
            whole[name] += float(product(inputs[0], dense[name]).float().square().sum(dtype=torch.float64))

        return linear.register_forward_pre_hook(hook)

    handles = [watch(name, linear) for name, linear in block.linears.items()]
    try:
        for name, linear in block.linears.items():
            linear.weight.data = dense[name]
        for batch, call in zip(hidden, calls, strict=True):
            run_block(block, batch, call)
            progress.advance()
    finally:
        for handle in handles:
            handle.remove()
        for name, linear in block.linears.items():
            linear.weight.data = pruned[name]
    return {name: relative_error(lost[name], whole[name]) for name in pruned}


def mean_threshold(dense: Tensor, pruned: Tensor, norm: Tensor) -> float:
    """The mean over rows of the largest Wanda score ``|W| * norm`` that was pruned; 0 for rows that lost nothing."""
    score = dense.float().abs() * norm
    return float(score.masked_fill_(pruned != 0, 0).amax(dim=1).mean())

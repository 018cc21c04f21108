"""Selection by several processes: each a share of the rows, where rows are independent."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import Processes
from .methods.apply import Outcome
from .methods.groups import Group
from .selection import Target, row_sums_


def has_independent_rows(target: Target) -> bool:
    """Whether rows can be selected in shares. What compares more than a row is done whole by each process."""
    if target.method == "magnitude":
        return target.pattern is not None
    return target.method == "wanda" and not target.options.variant and target.options.group in (None, Group("row"))


def prune_rows_in_shares_(weight: Tensor, norm: Tensor | None, target: Target, processes: Processes) -> Outcome:
    """As :func:`wanda_kernels.pruning.methods.apply.prune_layer_`, each process a share of the rows."""
    if target.sparsity == 0:
        return Outcome(0.0, 1.0)
    shares = processes.shares(weight.shape[0])
    mine = shares[processes.rank]
    sums = torch.zeros(weight.shape[0], 2, dtype=torch.float32, device=weight.device)
    if len(mine):
        sums[mine.start : mine.stop] = row_sums_(weight[mine.start : mine.stop], norm, target)
    processes.exchange_rows_(weight, shares)
    processes.exchange_rows_(sums, shares)
    pruned, total = sums.double().sum(dim=0).tolist()
    return Outcome(pruned, total)

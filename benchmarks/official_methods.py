"""Plain reimplementations of the rules of the other methods, to compare with: written from the papers and from the
behaviour of the official codes (locuslab/wanda, its SparseGPT and its ablation; RIA; OWL), one layer and one sequence
at a time, in float32. They copy no line of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wanda_kernels.pruning.blocks import find_blocks
from wanda_kernels.pruning.recording import record_calls, run_block

# (weight, tokens of each sequence [tokens, C_in]) -> the pruned weight
Rule = Callable[[Tensor, list[Tensor]], Tensor]


@torch.no_grad()
def prune_layer_by_layer(model: nn.Module, input_ids: Tensor, rule: Rule | list[Rule]) -> None:
    """The official loop with ``rule`` for every layer, or one rule for each block. Keeps all inputs of a block."""
    blocks = find_blocks(model)
    recording = record_calls(model, blocks, list(input_ids.split(1)))
    hidden = recording.hidden
    for index, block in enumerate(blocks):
        seen: dict[str, list[Tensor]] = {name: [] for name in block.matrices}
        handles = [m.module.register_forward_pre_hook(_keep(seen[name])) for name, m in block.matrices.items()]
        for one, call in zip(hidden, recording.calls[index], strict=True):
            run_block(block, one, call)
        for handle in handles:
            handle.remove()
        chosen = rule[index] if isinstance(rule, list) else rule
        for name, linear in block.matrices.items():
            linear.weight.data = chosen(linear.weight.data, seen[name]).to(linear.weight.dtype)
        hidden = [run_block(block, one, call) for one, call in zip(hidden, recording.calls[index], strict=True)]


def _keep(inputs: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, args: inputs.append(args[0].flatten(0, -2))


def norms(inputs: list[Tensor]) -> Tensor:
    mean = torch.zeros(inputs[0].shape[1])
    for seen, tokens in enumerate(inputs):
        mean = mean * (seen / (seen + 1)) + torch.norm(tokens.t().float(), p=2, dim=1) ** 2 / (seen + 1)
    return mean.sqrt()


def hessian(inputs: list[Tensor]) -> Tensor:
    tokens = torch.cat(inputs).float()
    return 2 / len(inputs) * tokens.t() @ tokens


def lowest(score: Tensor, count: int) -> Tensor:
    """True for the ``count`` lowest of each row, the first of equals first."""
    order = torch.sort(score, dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def variant(weight: Tensor, inputs: list[Tensor], sparsity: float) -> Tensor:
    score = weight.float().abs() * norms(inputs)
    ordered = torch.sort(score, dim=1, stable=True).values
    sums, total = torch.cumsum(ordered, dim=1), score.sum(dim=1)
    bounds, alpha = [0.0, 0.8], 0.4
    while True:
        index = (sums <= (total * alpha)[:, None]).sum(dim=1) - 1
        mask = score <= ordered[torch.arange(len(score)), index][:, None]
        share = float(mask.float().mean())
        if abs(share - sparsity) <= 0.001 or bounds[1] - bounds[0] < 0.001:
            return weight.masked_fill(mask, 0)
        bounds[share > sparsity] = alpha
        alpha = (alpha + bounds[share <= sparsity]) / 2


def ria(weight: Tensor, inputs: list[Tensor], sparsity: float, power: float = 0.5) -> Tensor:
    size = weight.float().abs()
    score = (size / size.sum(0) + size / size.sum(1)[:, None]) * norms(inputs) ** power
    return weight.masked_fill(lowest(score.reshape(1, -1), int(score.numel() * sparsity)).view_as(score), 0)


def sparsegpt(
    weight: Tensor,
    inputs: list[Tensor],
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    metric: str = "sparsegpt",
    mask: Tensor | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """``metric``: sparsegpt, or mag or wanda for the iterative ablation; with ``mask`` the sequential one."""
    w, h, norm = weight.float().clone(), hessian(inputs), norms(inputs)
    dead = torch.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * torch.diag(h).mean() * torch.eye(len(h))
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)

    def score(columns: slice) -> Tensor:
        part = w[:, columns]
        if metric == "sparsegpt":
            return part**2 / torch.diag(u)[columns] ** 2
        return part.abs() * norm[columns] if metric == "wanda" else part.abs()

    for begin in range(0, w.shape[1], block):
        columns = slice(begin, min(begin + block, w.shape[1]))
        chosen = torch.zeros_like(w[:, columns], dtype=torch.bool)
        if mask is not None:
            chosen = mask[:, columns]
        elif pattern is None:
            scores = score(columns)
            chosen = scores <= torch.sort(scores.flatten()).values[int(scores.numel() * sparsity)]
        errors = torch.zeros_like(w[:, columns])
        for j in range(columns.start, columns.stop):
            if mask is None and pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                chosen[:, j - begin : j - begin + pattern[1]] = lowest(score(group), pattern[1] - pattern[0])
            errors[:, j - begin] = torch.where(chosen[:, j - begin], w[:, j], 0) / u[j, j]
            rest = slice(j + 1, columns.stop)
            w[:, rest] -= errors[:, j - begin, None] * u[j, rest]
            w[:, j] = torch.where(chosen[:, j - begin], 0, w[:, j])
        w[:, columns.stop :] -= errors @ u[columns, columns.stop :]
    return w


def owl_sparsities(
    model: nn.Module, input_ids: Tensor, sparsity: float, limit: float = 0.08, outlier: float = 5.0
) -> list[float]:
    ratios: list[float] = []
    scores: list[Tensor] = []

    def look(weight: Tensor, inputs: list[Tensor]) -> Tensor:
        scores.append((weight.abs() * norms(inputs)).flatten())
        return weight

    prune_layer_by_layer(model, input_ids, look)
    blocks = find_blocks(model)
    for block in blocks:
        mine = torch.cat([scores.pop(0) for _ in block.matrices])
        ratios.append(float((mine > mine.mean() * outlier).sum()) / mine.numel() * 100)
    spread = torch.tensor(ratios, dtype=torch.float64)
    density = (spread - spread.min()) / (spread.max() - spread.min()) * limit * 2
    return (1 - (density - density.mean() + 1 - sparsity)).tolist()

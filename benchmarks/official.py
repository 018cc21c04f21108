"""A plain reimplementation of the official pruning loop, to compare with: one sequence at a time, a hook on each
of the seven linear layers, torch.sort (unstructured) and a topk per group (N:M).

Written from the paper's algorithm and the behaviour of its reference code (locuslab/wanda); copies no line of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wanda_kernels.pruning.blocks import find_blocks
from wanda_kernels.pruning.recording import record_calls, run_block
from wanda_kernels.pruning.stopwatch import Stopwatch


class OfficialRun:
    """One run; ``seconds()`` by part, as the driver's own report has them.

    Args:
        stable: among equal scores of an N:M group the lowest column goes first. torch.topk leaves it open, and on
            SmolLM2 a handful of the 26.5 million groups tie: enough for other masks from there on.
        device: where the model is [default: the CPU].
    """

    def __init__(self, stable: bool = False, device: torch.device | None = None) -> None:
        self.stable = stable
        self._stopwatch = Stopwatch(device)

    def seconds(self) -> dict[str, float]:
        return dict.fromkeys(("forward", "statistics", "selection"), 0.0) | self._stopwatch.seconds()

    def prune(self, model: nn.Module, input_ids: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> None:
        with torch.no_grad():
            blocks = find_blocks(model)
            recording = record_calls(model, blocks, list(input_ids.split(1)))
            for index, block in enumerate(blocks):
                calls = recording.calls[index]
                mean_squares: dict[str, Tensor] = {
                    name: torch.zeros(matrix.weight.shape[1], device=matrix.weight.device)
                    for name, matrix in block.matrices.items()
                }
                seen = dict.fromkeys(mean_squares, 0)
                hooks = [
                    matrix.module.register_forward_hook(self._hook(name, mean_squares, seen))
                    for name, matrix in block.matrices.items()
                ]
                self._forward(block, recording.hidden, calls)
                for hook in hooks:
                    hook.remove()
                for name, linear in block.matrices.items():
                    with self._stopwatch.measure("selection"):
                        self._select(linear.weight.data, mean_squares[name], sparsity, pattern)
                recording.hidden = self._forward(block, recording.hidden, calls)

    def _forward(self, block, hidden, calls) -> list[Tensor]:  # type: ignore[no-untyped-def]
        with self._stopwatch.measure("forward"):
            return [run_block(block, one, call) for one, call in zip(hidden, calls, strict=True)]

    def _hook(self, name: str, mean_squares: dict[str, Tensor], seen: dict[str, int]):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            with self._stopwatch.measure("statistics"):
                x = inputs[0]
                tokens = x.reshape(-1, x.shape[-1]).t().float()
                mean_squares[name] *= seen[name] / (seen[name] + 1)
                seen[name] += 1
                mean_squares[name] += torch.norm(tokens, p=2, dim=1) ** 2 / seen[name]

        return hook

    def _select(self, weight: Tensor, mean_square: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> None:
        score = torch.abs(weight) * torch.sqrt(mean_square.reshape(1, -1))
        mask = torch.zeros_like(score, dtype=torch.bool)
        if pattern is None:
            order = torch.sort(score, dim=-1, stable=True)[1]
            mask.scatter_(1, order[:, : int(score.shape[1] * sparsity)], True)
        else:
            n, m = pattern
            for column in range(0, score.shape[1], m):
                group = score[:, column : column + m].float()
                if self.stable:
                    lowest = torch.sort(group, dim=1, stable=True)[1][:, : m - n]
                else:
                    lowest = torch.topk(group, m - n, dim=1, largest=False)[1]
                mask.scatter_(1, column + lowest, True)
        weight[mask] = 0

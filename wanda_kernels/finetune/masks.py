"""Dense training that keeps zeros: a hook on the gradients, and one after each step of the optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..pruning.blocks import count_zeros, find_blocks, matrices_of
from ..pruning.matrices import Matrix


def pruned_matrices(model: nn.Module) -> dict[str, Matrix]:
    """The linear layers and experts of the decoder blocks whose weights hold zeros, by their name in ``model``.

    Raises:
        ValueError: where none does, or the model cannot be pruned (see :func:`wanda_kernels.prune`), is compiled, or
            has adapters.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled: give the one that torch.compile was given, and compile afterwards")
    if any(hasattr(module, "base_layer") and hasattr(module, "active_adapters") for module in model.modules()):
        raise ValueError("the model has adapters already (peft): merge them first (merge_and_unload) or unload them")
    matrices = matrices_of(find_blocks(model))
    found = {name: matrix for name, matrix in matrices.items() if count_zeros(matrix.weight)}
    if not found:
        raise ValueError("no linear layer of the model holds zeros: prune it first")
    return found


class HeldMasks:
    """The hooks of :func:`hold_masks`; ``remove()`` takes them away."""

    def __init__(self, matrices: dict[str, Matrix], optimizer: torch.optim.Optimizer) -> None:
        self._held = [(matrix.stored, matrix.stored == 0) for matrix in matrices.values()]
        self._handles = [
            weight.register_hook(lambda gradient, zero=zero: gradient.masked_fill(zero, 0))
            for weight, zero in self._held
            if weight.requires_grad
        ]
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for weight, zero in self._held:
            weight.masked_fill_(zero, 0)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def hold_masks(model: nn.Module, optimizer: torch.optim.Optimizer) -> HeldMasks:
    """Keep every zero of the model's pruned layers at zero while ``optimizer`` trains it.

    Gradients of pruned weights are zero, so that clipping and momentum do not see them; after each step pruned weights
    are zero whatever the optimiser did (momentum from before, LBFGS). One bool a weight.

    Raises:
        ValueError: a model without zeros, or an optimiser that has none of the pruned weights.
    """
    matrices = pruned_matrices(model)
    trained: set[int] = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(matrix.stored) in trained for matrix in matrices.values()):
        raise ValueError("the optimizer trains none of the model's pruned weights")
    return HeldMasks(matrices, optimizer)

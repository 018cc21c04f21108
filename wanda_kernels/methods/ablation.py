"""The official code's ablations: the mask of magnitude or Wanda with SparseGPT's update.

Source: Wanda (arXiv 2306.11695), section 5, "weight update": ``ablate_*_seq``: the mask of the whole matrix first;
``ablate_*_iter``: block of columns by block, on the weights as they are then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, Needs, Outcome, Pattern, option
from .inputs import LayerInputs
from .magnitude import Magnitude
from .sparsegpt import BLOCK_SIZE, DAMPING, Score, check_solver, reconstruct_
from .wanda import Wanda


@dataclass(frozen=True)
class Ablation(Method):
    """``block_size``, ``damping``: of the solver."""

    needs = Needs.GRAM
    update: ClassVar[str]

    block_size: int = option(128, BLOCK_SIZE)
    damping: float = option(0.01, DAMPING)

    @property
    def keeps_weights(self) -> bool:
        return False

    def check(self, pattern: Pattern | None) -> None:
        super().check(pattern)
        check_solver(self.block_size, self.damping, pattern)

    def prune_(self, weight: Tensor, inputs: LayerInputs | None, sparsity: float, pattern: Pattern | None) -> Outcome:
        assert inputs is not None
        is_magnitude = self.baseline == Magnitude.name
        score = Score(torch.ones_like(inputs.norm) if is_magnitude else inputs.norm)
        mask = None
        if self.update == "sequential":
            alone = weight.clone()
            (Magnitude() if is_magnitude else Wanda()).prune_(alone, inputs, sparsity, pattern)
            mask = alone == 0
        return reconstruct_(weight, inputs.factor(self.damping), score, sparsity, pattern, self.block_size, mask)


class AblateMagSeq(Ablation):
    name, baseline, update = "ablate_mag_seq", Magnitude.name, "sequential"


class AblateWandaSeq(Ablation):
    name, baseline, update = "ablate_wanda_seq", Wanda.name, "sequential"


class AblateMagIter(Ablation):
    name, baseline, update = "ablate_mag_iter", Magnitude.name, "iterative"


class AblateWandaIter(Ablation):
    name, baseline, update = "ablate_wanda_iter", Wanda.name, "iterative"


ABLATIONS: tuple[type[Method], ...] = (AblateMagSeq, AblateWandaSeq, AblateMagIter, AblateWandaIter)

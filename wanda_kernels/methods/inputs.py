"""What is known of the inputs of a linear layer: the norm of each channel and, for SparseGPT, their Hessian."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

MOST_DAMPING = 100.0


@dataclass(frozen=True)
class Factor:
    """``upper``: U of ``(H + damping * mean(diag H) * I)^-1 = U^T U``. ``hessian``: that damped matrix, [C_in, C_in].
    ``dead``: [C_in], bool, channels that are always 0 (their diagonal was set to 1 first)."""

    upper: Tensor
    hessian: Tensor
    dead: Tensor
    damping: float


def factor_of(hessian: Tensor, damping: float) -> Factor:
    """Inverts the Hessian as SparseGPT does; where that fails, again with ten times the damping (from 0: with 0.01).

    Raises:
        ValueError: where even 100 times the mean of the diagonal does not make it positive definite.
    """
    dead = hessian.diagonal() == 0
    while damping <= MOST_DAMPING:
        damped = hessian.clone()
        damped.diagonal()[dead] = 1
        damped.diagonal().add_(damping * damped.diagonal().mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper.diagonal()).all()):
                return Factor(upper, damped, dead, damping)
        damping = 10 * damping if damping else 0.01
    raise ValueError(f"the Hessian is not positive definite, even with damping {MOST_DAMPING:g}")


@dataclass
class LayerInputs:
    """Shared by the layers that take the same input.

    Attributes:
        norm: [C_in], float32: L2 norm of each channel, up to one factor. Of fused experts [E, C_in].
        hessian: [C_in, C_in], float32: 2 / sequences * sum of x^T x, where the method needs it. Of fused experts
            [E, C_in, C_in].
        tokens: [E], of fused experts: how many the router sent to each.
        pooled: of fused experts: those that take the mean over all of them.
    """

    norm: Tensor
    hessian: Tensor | None = None
    tokens: Tensor | None = None
    pooled: list[int] = field(default_factory=list)
    _factors: dict[float, Factor] = field(default_factory=dict, repr=False)

    def pool(self, min_tokens: int) -> None:
        """Experts with fewer tokens take the mean over all experts: the root of the mean square of their norms."""
        assert self.tokens is not None
        self.pooled = torch.nonzero(self.tokens < min_tokens).flatten().tolist()
        if not self.pooled:
            return
        squares = torch.zeros_like(self.norm[0], dtype=torch.float64)
        for norm in self.norm:  # in order, so that the sum is the same everywhere
            squares += norm.double().square()
        self.norm[self.pooled] = (squares / len(self.norm)).sqrt().float()
        if self.hessian is not None:
            whole = torch.zeros_like(self.hessian[0])
            for hessian in self.hessian:
                whole += hessian / len(self.hessian)
            self.hessian[self.pooled] = whole

    def of_experts(self, experts: range) -> LayerInputs:
        some = slice(experts.start, experts.stop)
        return LayerInputs(self.norm[some], None if self.hessian is None else self.hessian[some])

    def of_expert(self, expert: int) -> LayerInputs:
        return LayerInputs(self.norm[expert], None if self.hessian is None else self.hessian[expert])

    def let_go(self) -> None:
        """Of the Hessian and what was made of it, which the last layer has used: gigabytes, of wide layers."""
        self.hessian = None
        self._factors.clear()

    def factor(self, damping: float) -> Factor:
        """Made once for all layers that share the input."""
        if self.hessian is None:
            raise ValueError("the method needs the Hessian of its inputs, and none was accumulated")
        if damping not in self._factors:
            self._factors[damping] = factor_of(self.hessian, damping)
        return self._factors[damping]

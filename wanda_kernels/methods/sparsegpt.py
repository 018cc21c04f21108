"""SparseGPT: columns are pruned from left to right, and what each loses is made up for by those after it.

Source: SparseGPT (arXiv 2301.00774), algorithm 1, with the masks of the official code of Wanda and of its ablation.
Float32 throughout. The weight is kept transposed, so that a column of it is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .. import _backend
from .base import Method, Needs, Outcome, Pattern, option
from .inputs import Factor, LayerInputs
from .select import GROUP, Group, kth_smallest, prune_masked_
from .wanda import wanda_score


@dataclass(frozen=True)
class Score:
    """``W^2 / scale^2`` (``is_squared``) or ``|W| * scale``; ``scale``: [C_in], float32."""

    scale: Tensor
    is_squared: bool = False

    def __call__(self, work: Tensor, columns: slice) -> Tensor:
        """``work``: those columns, [columns, C_out]."""
        scale = self.scale[columns].unsqueeze(1)
        return sparsegpt_score(work, scale) if self.is_squared else wanda_score(work, scale)


def sparsegpt_score(weight: Tensor, diagonal: Tensor) -> Tensor:
    """``W^2 / d_j^2``, d the diagonal of the upper Cholesky factor of the damped inverse Hessian: what the official
    code compares. Source: SparseGPT (arXiv 2301.00774), section 3."""
    return weight.float().square() / diagonal.square()


MOST_IN_TRITON = 1024  # columns of a block that a program's registers hold

BLOCK_SIZE = "sparsegpt, ablate: columns a block. \\[default: 128]"
DAMPING = "sparsegpt, ablate: share of the Hessian's diagonal. \\[default: 0.01]"


def check_solver(block_size: int, damping: float, pattern: Pattern | None) -> None:
    """Raises ValueError for what :func:`reconstruct_` cannot do."""
    if block_size < 1 or (pattern is not None and block_size % pattern.m):
        what = "at least 1" if pattern is None else f"a multiple of the pattern's M = {pattern.m}"
        raise ValueError(f"block_size must be {what}, got {block_size}")
    if not 0 <= damping < 100:
        raise ValueError(f"damping must be in [0, 100), got {damping}")


@dataclass(frozen=True)
class SparseGPT(Method):
    """``weight_update``: False: prune by its metric and leave the other weights alone; ``group``: then, what weights
    are compared with; ``block_size``, ``damping``: of the solver."""

    name = "sparsegpt"
    needs = Needs.GRAM

    group: Group | None = option(None, **GROUP)
    weight_update: bool = option(
        True, "sparsegpt: make up for what was pruned, or prune by its metric alone. \\[default: update]"
    )
    block_size: int = option(128, BLOCK_SIZE)
    damping: float = option(0.01, DAMPING)

    @property
    def keeps_weights(self) -> bool:
        return not self.weight_update

    def check(self, pattern: Pattern | None) -> None:
        super().check(pattern)
        check_solver(self.block_size, self.damping, pattern if self.weight_update else None)
        if self.group is not None and self.weight_update:
            raise ValueError(
                "sparsegpt compares within blocks of block_size columns: a group needs weight_update=False"
            )

    def prune_(self, weight: Tensor, inputs: LayerInputs | None, sparsity: float, pattern: Pattern | None) -> Outcome:
        assert inputs is not None
        factor = inputs.factor(self.damping)
        diagonal = factor.upper.diagonal()
        if self.weight_update:
            score = Score(diagonal.contiguous(), is_squared=True)
            return reconstruct_(weight, factor, score, sparsity, pattern, self.block_size)
        # the root has the order of W^2 / d^2, which the official code compares, but for the rounding of equals
        root = sparsegpt_score(weight, diagonal).sqrt_()
        mask = (self.group or Group("row")).mask(root, sparsity, pattern)
        return prune_masked_(weight, root, mask, factor.damping)


def reconstruct_(
    weight: Tensor,
    factor: Factor,
    score: Score,
    sparsity: float,
    pattern: Pattern | None,
    block_size: int,
    mask: Tensor | None = None,
) -> Outcome:
    """Prune ``weight``, [C_out, C_in], in place and update what is kept.

    Args:
        factor: of the inputs' Hessian.
        score: what decides, on the weights as they are when their turn comes.
        sparsity: one threshold per block of columns: everything up to the ``int(numel * sparsity)``-th lowest score
            (from 0) goes. Not used with ``pattern`` or ``mask``.
        block_size: columns updated at once; a multiple of the pattern's M.
        mask: [C_out, C_in], bool: prune these instead (``ablate_*_seq``).

    Returns:
        Its sums: the squared output error on the calibration data that the update leaves, and the squared output, in
        the same unit (damping counts as data).
    """
    left = weight.float().t().contiguous()
    left[factor.dead] = 0
    total = float(((factor.hessian @ left) * left).sum(dtype=torch.float64))
    lost = torch.zeros((), dtype=torch.float64, device=left.device)
    walk = _walk
    if left.is_cuda and block_size <= MOST_IN_TRITON and _backend.cuda_kernels("sparsegpt_block") == "triton":
        walk = _walk_in_triton
    for begin in range(0, left.shape[0], block_size):
        work = left[begin : begin + block_size]
        end = begin + work.shape[0]
        pruned: Tensor | None = None
        if mask is not None:
            pruned = mask[:, begin:end].t().contiguous()
        elif pattern is None:
            scores = score(work, slice(begin, end))
            pruned = scores <= kth_smallest(scores, int(scores.numel() * sparsity) + 1)
        own = Score(score.scale[begin:end], score.is_squared)
        errors = walk(work, factor.upper[begin:end, begin:end], pruned, own, pattern)
        left[end:].addmm_(factor.upper[begin:end, end:].t(), errors, alpha=-1)
        lost += errors.square().sum(dtype=torch.float64)
    weight.copy_(left.t())
    return Outcome.of(float(lost), total, factor.damping)


def _walk(work: Tensor, upper: Tensor, pruned: Tensor | None, score: Score, pattern: Pattern | None) -> Tensor:
    """Prune a block's columns one after the other, and update those behind.

    Args:
        work: [columns, C_out], changed in place.
        upper: [columns, columns].
        pruned: [columns, C_out], bool; None: by ``score`` and ``pattern``, when a group's turn comes.

    Returns:
        [columns, C_out]: what each column lost, over its diagonal element of ``upper``.
    """
    is_decided = pruned is not None
    if pruned is None:
        pruned = torch.zeros_like(work, dtype=torch.bool)
    errors = torch.empty_like(work)
    for i in range(work.shape[0]):
        if not is_decided and pattern is not None and i % pattern.m == 0:
            group = slice(i, i + pattern.m)
            order = torch.sort(score(work[group], group), dim=0, stable=True).indices
            pruned[group] = torch.zeros_like(pruned[group]).scatter_(0, order[: pattern.m - pattern.n], True)
        kept = work[i].masked_fill(pruned[i], 0)
        errors[i] = (work[i] - kept) / upper[i, i]
        work[i] = kept
        work[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
    return errors


def _walk_in_triton(
    work: Tensor, upper: Tensor, pruned: Tensor | None, score: Score, pattern: Pattern | None
) -> Tensor:
    """The same in one launch, where the loop has seven a column."""
    n, m = (0, 0) if pattern is None else (pattern.n, pattern.m)
    arguments = (work, upper, pruned, score.scale, score.is_squared, n, m)
    return cast(Tensor, _backend.in_triton("sparsegpt_block")(*arguments))

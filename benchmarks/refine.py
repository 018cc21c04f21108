"""Refinement of masks: rows of a weight to convergence, against the reference's vectorised PyTorch on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, Inputs, Settings, WrongResultError
from benchmarks.operators import Shapes, backend_of
from wanda_kernels import ops, reference

ROWS = 192  # on a CPU: rows do not depend on one another, and the peer takes seconds for these
CHECKED_ROWS = 8  # the reference adds one column after the other
DAMPING, SWEEPS = 0.3, 4


def correlated(tokens: int, cols: int, device: torch.device) -> Tensor:
    """Inputs [tokens, cols] as a language model's: few directions, a mean of their own, a hundredth of outliers. The
    Gram matrix of white noise has next to nothing to refine."""
    rank = max(8, cols // 8)
    x = torch.randn(tokens, rank, device=device) @ torch.randn(rank, cols, device=device) / rank**0.5
    x += 0.3 * torch.randn(tokens, cols, device=device) + 0.5 * torch.randn(cols, device=device)
    outliers = torch.randperm(cols, device=device)[: max(1, cols // 100)]
    x[:, outliers] *= 20 * torch.rand(len(outliers), device=device) + 5
    return x


def _by_rows(run: Callable[..., Tensor], mask: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    return run(mask, weight, gram, DAMPING)


def _by_groups(run: Callable[..., Tensor], mask: Tensor, weight: Tensor, gram: Tensor) -> Tensor:
    return run(mask, weight, gram, 2, 4, DAMPING, SWEEPS)


def vectorised_rows(inputs: Inputs) -> Tensor:
    """The reference, but that a product of matrices makes its first sums, in float32."""
    mask, weight, gram = inputs
    c = (weight.float() * mask @ gram).double()
    return reference.refine_rows_from(c, mask, weight, gram, DAMPING, max(1, mask.shape[1] // 16), None)


def vectorised_groups(inputs: Inputs) -> Tensor:
    mask, weight, gram = inputs
    c = (weight.float() * mask @ gram).double()
    return reference.refine_nm_from(c, mask, weight, gram, 4, DAMPING, SWEEPS, None)


def refine(settings: Settings, shapes: Shapes) -> Iterator[Case]:
    """On the width of the first shape: half of each row to convergence, and four sweeps over 2:4."""
    rows, cols = shapes[0]
    if settings.device.type == "cpu":
        rows = min(ROWS, rows)
    kinds: tuple[tuple[str, str, Callable[..., Tensor], Callable[[Inputs], Tensor]], ...] = (
        ("refine_rows_", "", _by_rows, vectorised_rows),
        ("refine_nm_", " 2:4", _by_groups, vectorised_groups),
    )
    for operator, pattern, call, peer in kinds:
        yield _case(settings, rows, cols, operator, pattern, call, peer)


def _case(
    settings: Settings, rows: int, cols: int, operator: str, pattern: str, call: Callable[..., Tensor],
    peer: Callable[[Inputs], Tensor],
) -> Case:  # fmt: skip
    def make() -> tuple[Tensor, Tensor, Tensor]:
        x = correlated(2 * cols, cols, settings.device)
        weight, gram = torch.randn(rows, cols, device=settings.device), x.T @ x
        norm = gram.diagonal().sqrt()
        mask = reference.nm_mask(weight, norm, 2, 4) if pattern else reference.row_mask(weight, norm, 0.5)
        return mask, weight, gram

    def run(inputs: Inputs) -> Tensor:
        return call(getattr(ops, operator), *inputs)

    def check(inputs: Inputs) -> str:
        mask, weight, gram = inputs
        some = torch.linspace(0, rows - 1, min(CHECKED_ROWS, rows), device=mask.device).long()
        wanted = mask[some]
        swaps = call(getattr(reference, operator), wanted, weight[some], gram)
        got = run(inputs)
        if not torch.equal(mask[some], wanted) or not torch.equal(got[some], swaps):
            raise WrongResultError("its rows differ from the reference's")
        return f"{len(some)} rows equal the reference's; {got.float().mean():.1f} swaps a row"

    return Case(
        "refine", operator + pattern, f"{rows} x {cols}", torch.float32, backend_of(operator, settings.device), make,
        run, check, 4 * cols * cols, {"vectorised reference": peer},
        threads=1 if settings.device.type == "cpu" else "", in_place=True,
    )  # fmt: skip

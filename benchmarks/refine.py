"""Gram matrices, refinement of masks by them, rows of a weight to convergence, against the reference's vectorised
PyTorch on the same rows; the update of kept weights, against conjugate gradients as one writes them in PyTorch; and
int4's levels, against the reference's columns of all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Case, Inputs, Settings, WrongResultError
from benchmarks.operators import Shapes, backend_of
from wanda_kernels import ops, reference
from wanda_kernels.packed.values import ValueType, dequantize, quantize

ROWS = 192  # on a CPU: rows do not depend on one another, and the peer takes seconds for these
CHECKED_ROWS = 8  # the reference adds one column after the other
DAMPING, SWEEPS, STEPS = 0.3, 4, 10
TOKENS = 512  # of a sequence


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
    return reference.gram.refine_rows_from(c, mask, weight, gram, DAMPING, max(1, mask.shape[1] // 16), None)


def vectorised_groups(inputs: Inputs) -> Tensor:
    mask, weight, gram = inputs
    c = (weight.float() * mask @ gram).double()
    return reference.gram.refine_nm_from(c, mask, weight, gram, 4, DAMPING, SWEEPS, None)


def refine(settings: Settings, shapes: Shapes) -> Iterator[Case]:
    """On the width of the first shape: a sequence's Gram matrix, half of each row to convergence, four sweeps over
    2:4, ten steps of the update, and three passes over the levels."""
    rows, cols = shapes[0]
    if settings.device.type == "cpu":
        rows = min(ROWS, rows)
    yield _gram(settings, cols)
    kinds: tuple[tuple[str, str, Callable[..., Tensor], Callable[[Inputs], Tensor]], ...] = (
        ("refine_rows_", "", _by_rows, vectorised_rows),
        ("refine_nm_", " 2:4", _by_groups, vectorised_groups),
    )
    for operator, pattern, call, peer in kinds:
        yield _case(settings, rows, cols, operator, pattern, call, peer)
    yield _solve(settings, rows, cols)
    yield _levels(settings, rows, cols)


def _gram(settings: Settings, cols: int) -> Case:
    def make() -> tuple[Tensor, Tensor]:
        return torch.zeros(cols, cols, device=settings.device), correlated(TOKENS, cols, settings.device)

    def run(inputs: Inputs) -> None:
        ops.add_gram_(*inputs)

    def whole_product(inputs: Inputs) -> None:
        gram, x = inputs
        gram.addmm_(x.t(), x)

    def check(inputs: Inputs) -> str:
        gram, x = inputs
        run(inputs)
        wanted = (x.double().t() @ x.double()).tril()
        error = float((gram.tril() - wanted).abs().max() / wanted.abs().max())
        if not error < 1e-5:
            raise WrongResultError(f"{error:.1e} of the largest element away from float64")
        return f"{error:.1e} of the largest element away from float64"

    return Case(
        "refine", "add_gram_", f"{TOKENS} x {cols}", torch.float32, backend_of("add_gram_", settings.device), make, run,
        check, 4 * cols * cols, {"torch product": whole_product},
        threads=1 if settings.device.type == "cpu" else "", in_place=True,
    )  # fmt: skip


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


def conjugate_gradients(inputs: Inputs) -> Tensor:
    """The same steps on all rows at once, every state a new tensor."""
    _, mask, gram, target = inputs
    damped = gram + DAMPING * gram.diagonal().diag()
    kept, scale = (~mask).float(), damped.diagonal()
    d = -target * mask
    r = -(d @ damped) * kept
    p = z = r / scale
    rz = (r * z).sum(1, keepdim=True)
    for _ in range(STEPS):
        q = (p @ damped) * kept
        alpha = rz / (p * q).sum(1, keepdim=True)
        d, r = d + alpha * p, r - alpha * q
        z, was = r / scale, rz
        rz = (r * z).sum(1, keepdim=True)
        p = z + rz / was * p
    return target + d


def _solve(settings: Settings, rows: int, cols: int) -> Case:
    def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = correlated(2 * cols, cols, settings.device)
        target, gram = torch.randn(rows, cols, device=settings.device), x.T @ x
        return torch.empty_like(target), reference.row_mask(target, gram.diagonal().sqrt(), 0.5), gram, target

    def run(inputs: Inputs) -> None:
        weight, mask, gram, target = inputs
        ops.solve_rows_(weight, mask, gram, target, DAMPING, STEPS)

    def check(inputs: Inputs) -> str:
        weight, mask, gram, target = inputs
        run(inputs)
        damped = gram.double() + DAMPING * gram.double().diagonal().diag()
        dense = target.double()
        differences = (target.masked_fill(mask, 0), weight, conjugate_gradients(inputs))
        before, ours, theirs = (float((d @ damped * d).sum()) for d in (w.double() - dense for w in differences))
        if weight[mask].any() or not ours < 1.001 * theirs:
            raise WrongResultError(f"errors {before:.4g} before, {ours:.4g} after, {theirs:.4g} by plain PyTorch")
        return f"{ours / before:.3f} of the error is left"

    return Case(
        "refine", "solve_rows_", f"{rows} x {cols}", torch.float32, backend_of("solve_rows_", settings.device), make,
        run, check, 4 * cols * cols, {"PyTorch": conjugate_gradients},
        threads=1 if settings.device.type == "cpu" else "", in_place=True,
    )  # fmt: skip


def _levels(settings: Settings, rows: int, cols: int) -> Case:
    kind = ValueType(4, 64)

    def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = correlated(2 * cols, cols, settings.device)
        weight, gram = torch.randn(rows, cols, device=settings.device), x.T @ x
        weight.masked_fill_(reference.row_mask(weight, gram.diagonal().sqrt(), 0.5), 0)
        levels, scales = quantize(weight, kind, gram.diagonal())
        return levels, weight, scales, gram

    def run(inputs: Inputs) -> None:
        levels, weight, scales, gram = inputs
        ops.calibrate_levels_(levels, weight, scales, gram, kind.bits)

    def by_reference(inputs: Inputs) -> None:
        levels, weight, scales, gram = inputs
        reference.calibrate_levels_(levels, weight, scales, gram, kind.bits)

    def check(inputs: Inputs) -> str:
        levels, weight, scales, gram = inputs
        start, theirs = levels.clone(), levels.clone()
        run(inputs)
        by_reference((theirs, weight, scales, gram))
        damped = gram.double() + gram.double().diagonal().diag()
        differences = (dequantize(one, scales, kind).double() - weight.double() for one in (start, levels, theirs))
        before, ours, wanted = (((d @ damped) * d).sum(1) for d in differences)
        if levels[weight == 0].any() or levels.abs().max() > 8 or not (ours < 1.01 * wanted).all():
            raise WrongResultError(f"errors {ours.sum():.4g}, {wanted.sum():.4g} by the reference")
        return f"{ours.sum() / before.sum():.3f} of the error is left"

    return Case(
        "refine", "calibrate_levels_", f"{rows} x {cols}", torch.float32,
        backend_of("calibrate_levels_", settings.device), make, run, check, 4 * cols * cols,
        {"PyTorch reference": by_reference},
        threads=1 if settings.device.type == "cpu" else "", in_place=True,
    )  # fmt: skip

"""The operators on LLaMA's shapes: what runs, what it is compared with, how its result is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, silu

from benchmarks import peers
from benchmarks.harness import Case, Inputs, Settings, WrongResultError, clone
from wanda_kernels import _backend, ops, reference

CHECKED_ROWS = 64  # evenly spread over the weight: rows do not depend on one another, and the reference is slow
PEER_ROWS = 1024  # on the CPU, where the peers take minutes for the whole of a large weight
TOKENS = 2048
EXPERTS, EXPERTS_OF_A_TOKEN = (64, 128), 8
WIDTHS = (torch.bfloat16, torch.float32)
Shapes = Sequence[tuple[int, int]]


def backend_of(operator: str, device: torch.device) -> str:
    if device.type == "cuda":
        return _backend.cuda_kernels(operator)
    return f"cpu {_backend.extension.isa()}" if _backend.extension else "cpu reference"


def _name(rows: int, cols: int) -> str:
    return f"{rows} x {cols}"


def _one_thread(settings: Settings) -> int | str:
    return 1 if settings.device.type == "cpu" else ""


def weighted(rows: int, cols: int, dtype: torch.dtype, settings: Settings) -> tuple[Tensor, Tensor]:
    norm = torch.rand(cols, device=settings.device) + 0.2
    return torch.randn(rows, cols, device=settings.device).to(dtype), norm


def _sampled(weight: Tensor) -> Tensor:
    rows = torch.linspace(0, weight.shape[0] - 1, min(CHECKED_ROWS, weight.shape[0])).long()
    return rows.to(weight.device)


def rows_are_equal(run: Callable[[Inputs], Any], expected: Callable[[Tensor, Tensor], Any]) -> Callable[[Inputs], str]:
    """Both return the result, or work in place and return None."""

    def check(inputs: tuple[Tensor, Tensor]) -> str:
        weight, norm = inputs
        rows = _sampled(weight)
        right = weight[rows].clone()
        returned = run(inputs)
        wanted = expected(right, norm)
        got = weight if returned is None else returned
        if not torch.equal(got[rows], right if wanted is None else wanted):
            raise WrongResultError("its rows differ from the reference's")
        return f"{len(rows)} rows equal the reference's"

    return check


def _equal(run: Callable[[Inputs], Any], expected: Callable[[Inputs], Any]) -> Callable[[Inputs], str]:
    def check(inputs: Inputs) -> str:
        got, wanted = run(clone(inputs)), expected(inputs)
        pairs = zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]
        if not all(torch.equal(a, b) for a, b in pairs):
            raise WrongResultError("its result differs from the reference's")
        return "equals the reference's"

    return check


def _close(run: Callable[[Inputs], Any], expected: Callable[[Inputs], Any], most: float) -> Callable[[Inputs], str]:
    """Largest difference, relative to the largest element, of each of the results."""

    def check(inputs: Inputs) -> str:
        got, wanted = run(clone(inputs)), expected(clone(inputs))
        pairs = zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]
        error = max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)
        if not error <= most:
            raise WrongResultError(f"its result is off by {error:.2e}, {most:.0e} is allowed")
        return f"relative error {error:.1e}"

    return check


SUMS = " + sums"  # of an operator that also gives the sums of squared scores, as the driver asks


def with_sums(run: Callable[..., Any]) -> Callable[[Inputs], Any]:
    """``run(weight, norm, score_sums)``."""

    def summed(inputs: tuple[Tensor, Tensor]) -> None:
        weight, norm = inputs
        run(weight, norm, torch.empty(weight.shape[0], 2, device=weight.device))

    return summed


def select(settings: Settings, shapes: Shapes) -> Iterator[Case]:
    """Unstructured selection, half of each row."""
    for dtype in WIDTHS:
        for rows, cols in shapes:
            yield from _selection(settings, rows, cols, dtype, "prune_rows_" + SUMS)
            yield from _selection(settings, rows, cols, dtype, "prune_rows_")
        yield from _selection(settings, *shapes[0], dtype, "row_mask")


def _selection(settings: Settings, rows: int, cols: int, dtype: torch.dtype, name: str) -> Iterator[Case]:
    operator = name.removesuffix(SUMS)
    run: Callable[[Inputs], Any] = lambda inputs: getattr(ops, operator)(*inputs, 0.5)  # noqa: E731
    if operator != name:
        run = with_sums(lambda weight, norm, sums: ops.prune_rows_(weight, norm, 0.5, sums))
    check = rows_are_equal(run, lambda weight, norm: getattr(reference, operator)(weight, norm, 0.5))
    found = peers.select_peers(settings.device) if name == "prune_rows_" else {}
    yield from _on_rows("select", name, settings, rows, cols, dtype, run, check, found)


def nm(settings: Settings, shapes: Shapes) -> Iterator[Case]:
    """N:M selection, and packing."""
    for dtype in WIDTHS:
        for n, m in ((2, 4), (4, 8)):
            for operator in ("prune_nm_", "nm_mask"):
                for rows, cols in shapes if operator == "prune_nm_" else shapes[:1]:
                    run = partial(_run_nm, getattr(ops, operator), n=n, m=m)
                    check = rows_are_equal(run, partial(getattr(reference, operator), n=n, m=m))
                    found: dict[str, Callable[[Inputs], Any]] = {"official loop": partial(peers.official_nm, n=n, m=m),
                             "topk on groups": partial(peers.grouped_topk, n=n, m=m)}  # fmt: skip
                    found = found if operator == "prune_nm_" else {}
                    name = f"{operator} {n}:{m}"
                    yield from _on_rows("nm", name, settings, rows, cols, dtype, run, check, found)
            for rows, cols in shapes:
                summed = with_sums(partial(_run_nm_sums, n=n, m=m))
                check = rows_are_equal(summed, partial(reference.prune_nm_, n=n, m=m))
                yield from _on_rows("nm", f"prune_nm_ {n}:{m}{SUMS}", settings, rows, cols, dtype, summed, check, {})
    for rows, cols in shapes:
        yield from _packing(settings, rows, cols)


def _run_nm(operator: Callable[..., Any], inputs: tuple[Tensor, Tensor], n: int, m: int) -> Any:
    return operator(*inputs, n, m)


def _run_nm_sums(weight: Tensor, norm: Tensor, sums: Tensor, n: int, m: int) -> None:
    ops.prune_nm_(weight, norm, n, m, sums)


def _on_rows(
    suite: str, operator: str, settings: Settings, rows: int, cols: int, dtype: torch.dtype,
    run: Callable[[Inputs], Any], check: Callable[[Inputs], str], found: dict[str, Callable[[Inputs], Any]],
) -> Iterator[Case]:  # fmt: skip
    """The whole weight; and, on the CPU, its first rows with the peers."""
    in_place = operator.split()[0].endswith("_")
    name = operator.split()[0]

    def case(height: int, with_peers: dict[str, Callable[[Inputs], Any]]) -> Case:
        element = torch.empty((), dtype=dtype).element_size()
        moved = height * cols * (2 * element if in_place else element + 1)
        return Case(
            suite, operator, _name(height, cols), dtype, backend_of(name, settings.device),
            partial(weighted, height, cols, dtype, settings), run, check, moved, with_peers,
            threads=_one_thread(settings), in_place=in_place,
        )  # fmt: skip

    if settings.device.type == "cuda" or rows <= PEER_ROWS or not found:
        yield case(rows, found)
    else:
        yield case(rows, {})
        yield case(PEER_ROWS, found)


def _packing(settings: Settings, rows: int, cols: int) -> Iterator[Case]:
    dtype = torch.bfloat16
    if rows % 32 or cols % 64:
        return

    def pruned() -> tuple[Tensor]:
        weight, norm = weighted(rows, cols, dtype, settings)
        ops.prune_nm_(weight, norm, 2, 4)
        return (weight,)

    few = min(rows, PEER_ROWS)  # a multiple of 32; the layout of the metadata knows blocks of 32 rows
    shared: dict[str, Any] = {
        "suite": "nm",
        "shape": _name(rows, cols),
        "dtype": dtype,
        "threads": _one_thread(settings),
    }
    packed: dict[str, Callable[[Inputs], Any]] = {"torch's conversion": lambda inputs: peers.torch_24(inputs[0])}
    if settings.device.type == "cuda":
        packed["to_sparse_semi_structured"] = lambda inputs: peers.semi_structured(inputs[0])
    yield Case(
        operator="pack_24", backend=backend_of("pack_24", settings.device), make=pruned,
        run=lambda inputs: ops.pack_24(*inputs), bytes=rows * cols * 2 * 25 // 16,
        check=_first(few, lambda inputs: ops.pack_24(*inputs), lambda inputs: reference.pack_24(*inputs)),
        peers=packed, **shared,
    )  # fmt: skip
    yield Case(
        operator="prune_pack_24", backend=backend_of("prune_pack_24", settings.device),
        make=partial(weighted, rows, cols, dtype, settings), run=lambda inputs: ops.prune_pack_24(*inputs),
        check=_first(few, lambda inputs: ops.prune_pack_24(*inputs), lambda inputs: reference.prune_pack_24(*inputs)),
        bytes=rows * cols * 2 * 25 // 16, **shared,
    )  # fmt: skip


def _first(rows: int, run: Callable[[Inputs], Any], expected: Callable[[Inputs], Any]) -> Callable[[Inputs], str]:
    equal = _equal(run, expected)
    return lambda inputs: f"first {rows} rows: " + equal((inputs[0][:rows].clone(), *inputs[1:]))


def stats(settings: Settings, shapes: Shapes) -> Iterator[Case]:
    """Sums of squares of [2048, C_in], alone and on the way; widths are those of the weights' inputs. And by expert."""
    tokens = 128 if settings.quick else TOKENS
    for dtype in WIDTHS:
        for cols in dict.fromkeys(cols for _, cols in shapes):
            yield from statistics_cases(settings, tokens, cols, dtype)
        for experts in EXPERTS:
            yield segment_case(settings, tokens // 2, 256 if settings.quick else 2048, dtype, experts)


def segment_case(settings: Settings, tokens: int, cols: int, dtype: torch.dtype, experts: int) -> Case:
    """Tokens sorted by expert, eight experts each, of which few see many, against the same rows as one sequence."""
    device, rows = settings.device, tokens * EXPERTS_OF_A_TOKEN
    shares = 1 / torch.arange(1, experts + 1).float()
    ends = (shares.cumsum(0) / shares.sum() * rows).round().int().to(device)

    def inputs() -> tuple[Tensor]:
        return (torch.randn(rows, cols, device=device).to(dtype),)

    def segmented(x: tuple[Tensor, ...]) -> Tensor:
        sqnorm = torch.zeros(experts, cols, device=device)
        ops.add_sqnorm_(sqnorm, x[0], ends=ends)
        return sqnorm

    def one_by_one(x: tuple[Tensor, ...]) -> Tensor:
        parts = x[0].double().square().tensor_split(ends[:-1].tolist())
        return torch.stack([part.sum(0) for part in parts])

    return Case(
        suite="stats", operator=f"add_sqnorm_ {experts} segments", shape=_name(rows, cols), dtype=dtype,
        backend=backend_of("add_sqnorm_", device), make=inputs, run=segmented,
        check=_close(segmented, one_by_one, 1e-5), bytes=rows * cols * torch.empty((), dtype=dtype).element_size(),
        peers={"one sequence": lambda x: ops.add_sqnorm_(torch.zeros(cols, device=device), x[0])},
        threads=_one_thread(settings),
    )  # fmt: skip


def statistics_cases(settings: Settings, tokens: int, cols: int, dtype: torch.dtype) -> Iterator[Case]:
    device = settings.device

    def inputs(count: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(tokens, cols, device=device).to(dtype) for _ in range(count))

    def alone(x: tuple[Tensor, ...]) -> Tensor:
        sqnorm = torch.zeros(cols, device=device)
        ops.add_sqnorm_(sqnorm, x[0])
        return sqnorm

    element = torch.empty((), dtype=dtype).element_size()
    shared: dict[str, Any] = {
        "suite": "stats", "shape": _name(tokens, cols), "dtype": dtype, "threads": _one_thread(settings)
    }  # fmt: skip
    yield Case(
        operator="add_sqnorm_", backend=backend_of("add_sqnorm_", device), make=partial(inputs, 1), run=alone,
        check=_close(alone, lambda x: x[0].double().square().sum(0), 1e-5), bytes=tokens * cols * element,
        peers={
            "official hook": lambda x: peers.official_norm(x[0]),
            "(x.float()**2).sum(0)": lambda x: peers.square_sum(x[0]),
            "plain read": lambda x: peers.plain_read(x[0]),
        }, **shared,
    )  # fmt: skip
    scale = torch.randn(cols, device=device).to(dtype)

    def normed(x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        sqnorm = torch.zeros(cols, device=device)
        return ops.rms_norm_sqnorm(x[0], scale, 1e-6, sqnorm), sqnorm

    def plain(y: Tensor) -> tuple[Tensor, Tensor]:
        return y, y.double().square().sum(0)

    # 16-bit types: one unit in the last place of an activation here and there.
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    yield Case(
        operator="rms_norm_sqnorm", backend=backend_of("rms_norm_sqnorm", device), make=partial(inputs, 1), run=normed,
        check=_close(normed, lambda x: plain(rms_norm(x[0].float(), (cols,), None, 1e-6).to(dtype) * scale), allowed),
        bytes=2 * tokens * cols * element,
        peers={"rms_norm, official hook": lambda x: peers.official_norm(rms_norm(x[0], (cols,), scale, 1e-6))},
        **shared,
    )  # fmt: skip
    activations: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
        ("silu", silu), ("gelu_tanh", partial(gelu, approximate="tanh")),
    )  # fmt: skip
    for name, activation in activations:
        operator = f"{name}_mul_sqnorm"

        def gated(x: tuple[Tensor, ...], operator: str = operator) -> tuple[Tensor, Tensor]:
            sqnorm = torch.zeros(cols, device=device)
            return getattr(ops, operator)(*x, sqnorm), sqnorm

        def unfused(x: tuple[Tensor, ...], activation: Callable[[Tensor], Tensor] = activation) -> Tensor:
            return activation(x[0]) * x[1]

        yield Case(
            operator=operator, backend=backend_of(operator, device), make=partial(inputs, 2), run=gated,
            check=_close(gated, partial(_then, unfused, plain), allowed),
            bytes=3 * tokens * cols * element,
            peers={"unfused, official hook": partial(_then, unfused, peers.official_norm)}, **shared,
        )  # fmt: skip


def _then(first: Callable[[Inputs], Any], second: Callable[[Any], Any], inputs: Inputs) -> Any:
    return second(first(inputs))

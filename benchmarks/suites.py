"""The suites of ``wanda-kernels bench``: what each measures, as steps that give rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from rich.progress import Progress

from benchmarks import end_to_end, experts, generate, operators, products, refine, scaling, shapes
from benchmarks.circumstances import circumstances
from benchmarks.harness import Case, Settings, WrongResultError, keep_freed_memory, measure
from benchmarks.records import Row, writer
from wanda_kernels.cli import interrupt

Step = tuple[str, Callable[[], list[Row]]]  # what it does, and its rows

KERNELS: dict[str, Callable[[Settings, operators.Shapes], Iterator[Case]]] = {
    "select": operators.select,
    "stats": operators.stats,
    "nm": operators.nm,
    "refine": refine.refine,
    "sparse": lambda settings, wanted: chain(products.sparse(settings, wanted), products.prefill(settings)),
}
MODELS = {"cpu": ("7B", "13B"), "cuda": tuple(shapes.MODELS)}  # measured where nothing else is asked for
SPARSE_MODELS = {"cpu": ("7B",), "cuda": ("7B", "65B", "3-8B", "3-70B")}
# In this order: what kernels are measured with (freed memory stays in the process) is not what whole models run with.
SUITES = ("end-to-end", *KERNELS, "scaling")


def steps_of(suite: str, settings: Settings, models: Sequence[str] | None) -> list[Step]:
    """Everything a suite measures, in order."""
    if suite in KERNELS:
        default = SPARSE_MODELS if suite == "sparse" else MODELS
        wanted = shapes.weights_of(list(models or default[settings.device.type]))
        cases = _distinct(KERNELS[suite](settings, shapes.QUICK if settings.quick else wanted))
        kernels: list[Step] = [(str(case), lambda case=case: measure(case, settings)) for case in cases]  # type: ignore[misc]
        return [*kernels, *experts.steps(settings)] if suite == "sparse" and settings.device.type == "cpu" else kernels
    if suite == "scaling":
        return scaling.steps(settings)
    return [*end_to_end.steps(settings), *generate.steps(settings)]


def _distinct(cases: Iterator[Case]) -> list[Case]:
    """Each operator and shape once, with its peers: several weights may have the same first rows."""
    found: dict[tuple[object, ...], Case] = {}
    for case in cases:
        key = (case.operator, case.shape, case.dtype, case.tokens, case.threads)
        if key not in found or (case.peers and not found[key].peers):
            found[key] = case
    return list(found.values())


def run(
    suite: str, settings: Settings, models: Sequence[str] | None, out: Path | None, shown: Progress
) -> tuple[list[Row], list[str]]:
    """Measures a suite and writes ``<out>/<suite>.csv``, row by row.

    Returns:
        Its rows, and what was found wrong: such cases have no row.
    """
    if settings.device.type == "cpu" and suite in KERNELS:
        keep_freed_memory()
    steps = steps_of(suite, settings, models)
    task = shown.add_task(suite, total=len(steps))
    common = {"device_type": settings.device.type, **circumstances(settings.device)}
    rows: list[Row] = []
    wrong: list[str] = []
    if not shown.console.is_terminal:  # no bar there
        shown.console.print(f"{suite}: {len(steps)} steps", highlight=False)

    def work(write: Callable[[Row], None] | None) -> None:
        threads = torch.get_num_threads()
        for name, measured in steps:
            shown.update(task, description=f"{suite}: {name}")
            interrupt.check()
            try:
                found = measured()
            except WrongResultError as error:
                wrong.append(f"{name}: {error}")
                shown.console.print(f"WRONG, and not timed: {wrong[-1]}", highlight=False, markup=False)
                found = []
            for row in found:
                row |= common
                rows.append(row)
                if write is not None:
                    write(row)
            torch.set_num_threads(threads)
            shown.advance(task)

    if out is None:
        work(None)
    else:
        with writer(out / f"{suite}.csv") as write:
            work(write)
    shown.remove_task(task)
    return rows, wrong


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the least-squares line through (log size, log value): 1 where the cost grows as the work."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - x_mean) ** 2 for x in xs)

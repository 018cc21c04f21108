"""What a command shows while it works: a bar with the time left, and a line per block. All on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from .. import _backend
from .._words import percent
from ..pruning.progress import Progress
from ..pruning.report import LayerReport, sparsity_of
from . import interrupt

# Text comes from users, files and models: it is never markup, an emoji's name or something to colour.
_PLAIN: dict[str, bool] = {"markup": False, "emoji": False, "highlight": False}
console = Console(stderr=True, **_PLAIN)  # type: ignore[arg-type]


def screen(width: int = 0) -> Console:
    """For results, on stdout. ``width``: at least so many columns, so that a table is not folded in a log."""
    found = Console(**_PLAIN)  # type: ignore[arg-type]
    found.width = max(found.width, width)
    return found


def say(text: str) -> None:
    """A line of results, not folded."""
    screen().print(text, soft_wrap=True)


def note(text: str) -> None:
    """A line beside the results, on stderr, not folded."""
    console.print(text, soft_wrap=True)


@contextmanager
def bar() -> Iterator[Bar]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left", markup=False),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as shown:
        yield shown


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner for a step whose end cannot be told; a plain line where stderr is no terminal."""
    interrupt.check()
    if console.is_terminal:
        with console.status(Text(f"{what} ...")):
            yield
    else:
        note(f"{what} ...")
        yield


def quiet_libraries() -> None:
    """Progress bars of transformers are for terminals; its advice on tied weights and such is not for users here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def tell_reference(device: torch.device) -> None:
    """A line where the slow PyTorch reference serves the operators on ``device``, and why."""
    status = _backend.cpu_status if device.type == "cpu" else _backend.cuda_status
    if _backend.serves_reference(device.type):
        note(f"note: running on the PyTorch reference: {status}")


def tell_reference_on_cpu() -> None:
    tell_reference(torch.device("cpu"))


class _OneBar(Progress):
    def __init__(self, shown: Bar, task: TaskID) -> None:
        self._bar, self._task = shown, task

    def start(self, steps: int) -> None:
        self._bar.update(self._task, total=steps, completed=0)

    def advance(self) -> None:
        interrupt.check()
        self._bar.advance(self._task)


@contextmanager
def pruning_bar(shown: Bar, what: str) -> Iterator[Progress]:
    """A bar for one of many pruning runs, without lines per block; it goes away afterwards."""
    task = shown.add_task(what, total=None)
    try:
        yield _OneBar(shown, task)
    finally:
        shown.remove_task(task)


class PruningDisplay(Progress):
    """Draws the driver's progress on ``shown``."""

    def __init__(self, shown: Bar) -> None:
        self._bar = shown
        self._task = shown.add_task("pruning", total=None)

    def start(self, steps: int) -> None:
        self._bar.update(self._task, total=steps)

    def advance(self) -> None:
        interrupt.check()
        self._bar.advance(self._task)

    def block(self, name: str, layers: list[LayerReport]) -> None:
        weights = sum(layer.numel for layer in layers)
        mean = sum(layer.estimated_error * layer.numel for layer in layers) / max(1, weights)
        share = percent(sparsity_of(layers), 2)
        self._bar.console.print(f"{name:<24} sparsity {share:>7}   estimated error {mean:.3f}")

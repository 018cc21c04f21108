"""What a command shows while it works: a bar with the time left, and a line per block. All on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from .. import _backend
from .._words import percent
from ..pruning.report import LayerReport, Progress, sparsity_of
from . import interrupt

# Text comes from users, files and models: it is never markup, an emoji's name or something to colour.
_PLAIN: dict[str, bool] = {"markup": False, "emoji": False, "highlight": False}
LOG_EVERY_S = 30.0
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


class LoggedBar(Bar):
    """Where stderr is no terminal a bar shows nothing: a line every ``LOG_EVERY_S`` seconds instead."""

    _last = 0.0

    def start(self) -> None:
        self._last = time.monotonic()
        super().start()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._log(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._log(task_id)

    def _log(self, task_id: TaskID) -> None:
        if self.console.is_terminal or time.monotonic() - self._last < LOG_EVERY_S:
            return
        self._last = time.monotonic()
        task = next(task for task in self.tasks if task.id == task_id)
        whole = "" if task.total is None else f" of {task.total:.0f}"
        note(f"{task.description}: {task.completed:.0f}{whole}")


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
    with LoggedBar(*columns, console=console, transient=True) as shown:
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
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    # torch says at its first compilation that there is no CUDA runtime; `wanda-kernels info` says it to who asks
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        of_transformers.disable_progress_bar()


def tell_reference(device: torch.device) -> None:
    """A line where the slow PyTorch reference serves the operators on ``device``, and why."""
    status = _backend.cpu_status if device.type == "cpu" else _backend.cuda_status
    if _backend.serves_reference(device.type):
        note(f"note: running on the PyTorch reference: {status}")


def tell_slow_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """A line where torch's products of ``dtype`` are slow on ``device``."""
    from ..packed.weight import product_dtype  # which has the measurement

    if device.type == "cpu" and product_dtype(dtype) != dtype:
        name = str(dtype).removeprefix("torch.")
        note(
            f"note: this processor has no products of {name}: --dtype float32 is faster, twice as large "
            "in memory and where it is saved"
        )


class OneBar(Progress):
    """``shown`` has a bar for the run."""

    def __init__(self, shown: Bar, what: str) -> None:
        self._bar, self.task = shown, shown.add_task(what, total=None)

    def start(self, steps: int) -> None:
        self._bar.update(self.task, total=steps, completed=0)

    def advance(self) -> None:
        interrupt.check()
        self._bar.advance(self.task)


@contextmanager
def pruning_bar(shown: Bar, what: str) -> Iterator[Progress]:
    """A bar for one of many pruning runs, without lines per block; it goes away afterwards."""
    progress = OneBar(shown, what)
    try:
        yield progress
    finally:
        shown.remove_task(progress.task)


class PruningDisplay(OneBar):
    """Draws the driver's progress on ``shown``, with a line per block."""

    def __init__(self, shown: Bar) -> None:
        super().__init__(shown, "pruning")

    def block(self, name: str, layers: list[LayerReport]) -> None:
        weights = sum(layer.numel for layer in layers)
        mean = sum(layer.estimated_error * layer.numel for layer in layers) / max(1, weights)
        share = percent(sparsity_of(layers), 2)
        self._bar.console.print(f"{name:<24} sparsity {share:>7}   estimated error {mean:.3f}")

"""Where a block's weights are while the driver works on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .activations import Activations

if TYPE_CHECKING:
    from .run import Run


class Residence:
    """In memory, all the time: nothing to do. :mod:`wanda_kernels.streaming` brings them from a disk and back."""

    @contextmanager
    def holding(self, index: int) -> Iterator[None]:
        """Inside, block ``index`` holds its weights."""
        yield

    def finished(self, index: int, run: Run, activations: Activations | None) -> None:
        """Block ``index`` is pruned, and ``activations`` (None without calibration) hold the next block's inputs."""

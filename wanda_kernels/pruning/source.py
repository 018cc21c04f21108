"""What gives the loop its blocks and takes them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..memory import in_files, take_from_files
from .activations import Activations
from .blocks import Block
from .report import LayerReport
from .stopwatch import Stopwatch


@dataclass
class Done:
    """What a run has done: so many ``blocks``, with the report on their ``layers``; ``sparsities``: of each of the
    model's blocks, where OWL chose them; ``can_resume``: whether another run can go on from here."""

    blocks: int = 0
    layers: list[LayerReport] = field(default_factory=list)
    sparsities: list[float] | None = None
    can_resume: bool = True


class BlockSource:
    """Blocks that are in memory all the time. :mod:`wanda_kernels.streaming` brings them from a disk."""

    def __init__(self, blocks: list[Block], stopwatch: Stopwatch) -> None:
        self.blocks = blocks
        self._stopwatch = stopwatch

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Inside, what runs before the blocks holds its weights."""
        yield

    def begin(self, index: int) -> None:
        """A pass over the blocks begins with block ``index``."""

    @contextmanager
    def holding(self, index: int) -> Iterator[None]:
        """Inside, block ``index`` holds its weights, in memory that can be written."""
        weights = [matrix.weight for matrix in self.blocks[index].matrices.values()]
        self._stopwatch.follow(weights[0].device)
        mapped = in_files(weights)
        if mapped:
            with self._stopwatch.measure("load"):
                take_from_files(mapped)
        yield

    def passed(self, index: int) -> None:
        """Block ``index`` was run, and is as it was."""

    def finished(self, index: int, done: Done, activations: Activations | None) -> None:
        """Block ``index`` is pruned, and ``activations`` (None without calibration) hold the next block's inputs."""

"""What gives the loop its blocks and takes them back, and what goes from block to block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from ..memory import in_files, take_from_files
from .blocks import Block
from .report import LayerReport
from .stopwatch import Stopwatch


class Activations:
    """Each batch's input of the current block, and, as they come, of the next one; both in memory.

    Reading gives the current block's inputs. Assigning sets the next block's, which :meth:`flip` makes the current
    ones.

    Args:
        keep: hold a batch's current input after its next one was set, until :meth:`flip`. Without it, memory holds
            each batch once.
    """

    def __init__(self, keep: bool = False) -> None:
        self._keep = keep
        self._now: list[Tensor | None] = []
        self._next: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forget all batches: a pass begins again with the first block."""
        self._now, self._next = [], {}

    def append(self, batch: Tensor) -> None:
        """One more batch for the current block."""
        self._now.append(batch)

    def __len__(self) -> int:
        return len(self._now)

    def __getitem__(self, index: int) -> Tensor:
        batch = self._now[index]
        assert batch is not None, f"batch {index} has gone on to the next block"
        return batch

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __setitem__(self, index: int, batch: Tensor) -> None:
        self._next[index] = batch
        if not self._keep:
            self._now[index] = None

    def flip(self) -> None:
        """On to the next block: every batch must have been set."""
        self._now = [self._next[index] for index in range(len(self._now))]
        self._next = {}


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
        weights = [matrix.stored for matrix in self.blocks[index].matrices.values()]
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

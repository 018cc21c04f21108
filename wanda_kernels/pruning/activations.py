"""The activations between two blocks, one tensor a batch: what the next block gets while this one is worked on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


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

"""Activations that can be found again after a crash, and that need not fit in memory."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATS
from ..models.checkpoint import bytes_of, open_own, read_at, write_at
from ..pruning.source import Activations

FLOAT_NAMES = {str(dtype).removeprefix("torch.") for dtype in FLOATS}


@dataclass(frozen=True)
class Stored:
    """What a state says of its activations: which of the two files, and the batches in it, one after the other. Where
    the files lie it does not say: that is the run's to know."""

    turn: int
    dtype: str
    shapes: list[list[int]]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Stored:
        """Raises ValueError for what is none as plain data."""
        stored = cls(data.get("turn", 0), data.get("dtype", ""), data.get("shapes", []))
        shapes = stored.shapes if isinstance(stored.shapes, list) else [None]
        sound = [isinstance(s, list) and all(isinstance(n, int) and n > 0 for n in s) for s in shapes]
        if stored.turn not in (0, 1) or stored.dtype not in FLOAT_NAMES or not shapes or not all(sound):
            raise ValueError(f"its activations are described as {str(data)[:100]}")
        return stored

    def check(self, done: int, batches: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Raises ValueError where they are not those of ``batches`` of ids after ``done`` blocks. ``dtype``: of the
        model; some models hand on float32."""
        if [shape[-3:-1] for shape in self.shapes] != [list(batch.shape) for batch in batches]:
            raise ValueError(f"its activations are of the shapes {str(self.shapes)[:100]}, not of this run's batches")
        if len({len(shape) for shape in self.shapes}) != 1 or len({shape[-1] for shape in self.shapes}) != 1:
            raise ValueError(f"its activations have the shapes {str(self.shapes)[:100]}")
        if self.turn != done % 2 or getattr(torch, self.dtype) not in (dtype, torch.float32):
            raise ValueError(f"its activations are {self.dtype} in file {self.turn}, after {done} blocks of {dtype}")

    @property
    def bytes(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes) * getattr(torch, self.dtype).itemsize


class TwoFiles:
    """Two files in turns: while one is written, the other has the last state's activations.

    Args:
        folder, stem: where they lie, and how their names begin.
        nameless: they lose their names at once, where no state will speak of them: a kill leaves nothing.
    """

    def __init__(self, folder: Path, stem: str, nameless: bool = False) -> None:
        self._paths = [folder / f"{stem}-{turn}.bin" for turn in (0, 1)]
        self._nameless = nameless
        self._fds: dict[int, int] = {}

    @classmethod
    def beside(cls, work: Path, offload: str | Path | None, nameless: bool = False) -> TwoFiles:
        """In the work folder, or in ``offload``, named after it."""
        if offload is None:
            return cls(work, "activations", nameless)
        return cls(Path(offload), f"wanda-{hashlib.sha256(str(work.absolute()).encode()).hexdigest()[:12]}", nameless)

    def path(self, turn: int) -> str:
        return str(self._paths[turn % 2])

    def fd(self, turn: int) -> int:
        turn %= 2
        if turn not in self._fds:
            self._fds[turn] = open_own(self._paths[turn], os.O_RDWR | os.O_CREAT)
            if self._nameless:
                self._paths[turn].unlink()
        return self._fds[turn]

    def check(self, stored: Stored) -> None:
        """Raises ValueError where the files do not hold what a state says."""
        size = os.fstat(self.fd(stored.turn)).st_size
        if size != stored.bytes:
            raise ValueError(f"{self.path(stored.turn)} has {size} bytes, the state's activations {stored.bytes}")

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def remove(self) -> None:
        self.close()
        for path in self._paths:
            path.unlink(missing_ok=True)


class FiledActivations(Activations):
    """Those that a state can speak of.

    Args:
        files: where they go, in turns.
        wait: called before the next block's first input is set: until the last state is complete, which holds on to
            the current ones, or whose file is written next.
        device: of the tensors.
    """

    def __init__(self, files: TwoFiles, wait: Callable[[], None], device: torch.device, keep: bool = False) -> None:
        super().__init__(keep)
        self._files = files
        self._wait = wait
        self._device = device
        self._turn = 0

    def flip(self) -> None:
        super().flip()
        self._turn += 1

    def clear(self) -> None:
        super().clear()
        self._turn = 0

    @abstractmethod
    def saver(self) -> Callable[[], Stored]:
        """A function, for another thread, that writes the current inputs and says where they are."""

    @abstractmethod
    def restore(self, stored: Stored) -> None:
        """Makes them the current inputs."""

    def _write(self, batch: Tensor, offset: int, turn: int) -> None:
        write_at(self._files.fd(turn), bytes_of(batch.contiguous().cpu()), offset, self._files.path(turn))

    def _read(self, shape: list[int], dtype: torch.dtype, offset: int) -> Tensor:
        batch = torch.empty(shape, dtype=dtype)
        read_at(self._files.fd(self._turn), bytes_of(batch), offset, self._files.path(self._turn))
        return batch.to(self._device)

    def _saved(self, turn: int, dtype: torch.dtype, shapes: list[list[int]]) -> Stored:
        os.fdatasync(self._files.fd(turn))
        return Stored(turn % 2, str(dtype).removeprefix("torch."), shapes)


class SavedActivations(FiledActivations):
    """In memory, and copied to a file for each state."""

    def __setitem__(self, index: int, batch: Tensor) -> None:
        if not self._next:
            self._wait()
        super().__setitem__(index, batch)

    def saver(self) -> Callable[[], Stored]:
        batches, turn = list(self), self._turn

        def save() -> Stored:
            offset = 0
            for batch in batches:
                self._write(batch, offset, turn)
                offset += batch.nbytes
            return self._saved(turn, batches[0].dtype, [list(batch.shape) for batch in batches])

        return save

    def restore(self, stored: Stored) -> None:
        self._turn = stored.turn
        offset = 0
        for shape in stored.shapes:
            self.append(self._read(shape, getattr(torch, stored.dtype), offset))
            offset += self[-1].nbytes


class SpilledActivations(FiledActivations):
    """On a disk: one batch at a time is in memory."""

    def __init__(self, files: TwoFiles, wait: Callable[[], None], device: torch.device) -> None:
        super().__init__(files, wait, device)
        self._dtype = torch.float32
        self._shapes: list[list[int]] = []
        self._set: set[int] = set()

    def clear(self) -> None:
        super().clear()
        self._shapes = []
        self._set.clear()

    def _offset(self, index: int) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes[:index]) * self._dtype.itemsize

    def append(self, batch: Tensor) -> None:
        self._dtype = batch.dtype
        self._shapes.append(list(batch.shape))
        self._write(batch, self._offset(len(self) - 1), self._turn)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):  # ends a for loop
            raise IndexError(index)
        return self._read(self._shapes[index], self._dtype, self._offset(index))

    def __setitem__(self, index: int, batch: Tensor) -> None:
        if not self._set:
            self._wait()
        if batch.dtype != self._dtype or list(batch.shape) != self._shapes[index]:
            raise ValueError(
                f"a block's outputs are {batch.dtype} {list(batch.shape)}, its inputs {self._dtype} "
                f"{self._shapes[index]}: such activations cannot be spilled"
            )
        self._write(batch, self._offset(index), self._turn + 1)
        self._set.add(index)

    def flip(self) -> None:
        assert len(self._set) == len(self)
        self._set.clear()
        super().flip()

    def saver(self) -> Callable[[], Stored]:
        turn = self._turn
        return lambda: self._saved(turn, self._dtype, self._shapes)

    def restore(self, stored: Stored) -> None:
        self._turn, self._dtype, self._shapes = stored.turn, getattr(torch, stored.dtype), stored.shapes

"""Blocks that come from a checkpoint while the one before is worked on, and go to another checkpoint pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import give_back_freed
from ..models.placement import Placement
from ..pruning.blocks import Block, refuse_non_finite
from ..pruning.source import Activations, BlockSource, Done
from ..pruning.stopwatch import Stopwatch
from .activations import FiledActivations
from .output import Output
from .skeleton import drop, outside_of, put, read, shared_names, tensor_of

ALIGNMENT = 64  # bytes, as torch's own allocations

Commit = Callable[[dict[str, Any]], None]


class StreamedBlocks(BlockSource):
    """Two blocks in memory: the one in work, and the one that is being written or read.

    One thread reads and writes, in order: block i and its state out, then block i + 2 into the same memory.

    Args:
        model: on the meta device (``skeleton.build``).
        blocks: of ``model``.
        placement: of its tensors in the files that are read.
        output: where pruned blocks go; None: they are not written (another process does it).
        commit: told the state after each block once everything that it speaks of is on the disk.
        device: to compute on.
        stopwatch: for the time that was waited.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        placement: Placement,
        output: Output | None,
        commit: Commit | None,
        device: torch.device,
        stopwatch: Stopwatch,
    ) -> None:
        super().__init__(blocks, stopwatch)
        self._model = model
        self._placement = placement
        self._output = output
        self._commit = commit
        self._device = device
        self._groups = shared_names(model)
        self._outside, _ = outside_of(model, blocks)
        self._names = [self._names_of(block) for block in blocks]
        self._places = [self._places_of(names) for names in self._names]
        self._slots: list[Tensor] = []
        self._reads: dict[int, Future[None]] = {}
        self._written: Future[None] | None = None
        self._io = ThreadPoolExecutor(1, thread_name_prefix="wanda-streaming")

    def _names_of(self, block: Block) -> list[str]:
        mine = [names for names in self._groups if any(name.startswith(f"{block.name}.") for name in names)]
        for names in mine:
            if len(names) > 1:
                raise ValueError(f"{names[0]} is shared with {names[1]}: such blocks cannot be streamed")
        return [names[0] for names in mine]

    def _places_of(self, names: list[str]) -> dict[str, slice]:
        places, end = {}, 0
        for name in names:
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            end = begin + tensor_of(self._model, name).nbytes
            places[name] = slice(begin, end)
        return places

    @property
    def block_bytes(self) -> int:
        """Of the largest block."""
        return max(max((place.stop for place in places.values()), default=0) for places in self._places)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Inside, all but the blocks and the output embedding is loaded."""
        with self._stopwatch.measure("load"):
            for names in self._outside:
                tensor = read(self._model, names, self._placement).to(self._device)
                for name in names:
                    put(self._model, name, tensor)
            for name, buffer in list(self._model.named_buffers()):
                if not buffer.is_meta:  # as those of blocks are that are done
                    put(self._model, name, buffer.to(self._device))
        yield
        for names in self._outside:
            for name in names:
                drop(self._model, name)

    def begin(self, index: int) -> None:
        if not self._slots:
            pinned = self._device.type == "cuda"
            self._slots = [torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        for first in (index, index + 1):
            self._submit_read(first)

    def _submit_read(self, index: int) -> None:
        if index < len(self.blocks):
            self._reads[index] = self._io.submit(self._read, index)

    def _view(self, index: int, name: str) -> Tensor:
        own = tensor_of(self._model, name)
        return self._slots[index % 2][self._places[index][name]].view(own.dtype).view(own.shape)

    def _read(self, index: int) -> None:
        for name in self._names[index]:
            self._placement.read(name, self._view(index, name))

    @contextmanager
    def holding(self, index: int) -> Iterator[None]:
        if self._written is not None and self._written.done():
            self._written.result()  # a full disk is told at once
        with self._stopwatch.measure("load"):
            self._reads.pop(index).result()
        for name in self._names[index]:
            put(self._model, name, self._view(index, name).to(self._device))
        refuse_non_finite([self.blocks[index]])
        yield
        for name in self._names[index]:
            tensor, view = tensor_of(self._model, name), self._view(index, name)
            if tensor.data_ptr() != view.data_ptr():
                view.copy_(tensor)
            drop(self._model, name)
        give_back_freed()  # else glibc keeps what was freed in pieces: 30 MB more with each block of 100 MB

    def passed(self, index: int) -> None:
        self._submit_read(index + 2)

    def finished(self, index: int, done: Done, activations: Activations | None) -> None:
        self.wait()
        assert activations is None or isinstance(activations, FiledActivations)
        last = index == len(self.blocks) - 1
        saver = None if activations is None or last else activations.saver()
        layers = [asdict(layer) for layer in done.layers]
        state = {"done": done.blocks, "layers": layers, "sparsities": done.sparsities}

        def write() -> None:
            if self._output is not None:
                self._output.write_block(index, {name: self._view(index, name) for name in self._names[index]})
            if self._output is not None and self._commit is not None and done.can_resume:
                stored = None if saver is None else asdict(saver())
                self._commit(state | {"activations": stored, "packed": self._output.state()})

        self._written = self._io.submit(write)
        self._submit_read(index + 2)

    def wait(self) -> None:
        """Until the last finished block and its state are on the disk. Raises what went wrong there."""
        if self._written is not None:
            with self._stopwatch.measure("saving"):
                self._written.result()

    def finish(self) -> None:
        """Until the whole checkpoint is written."""
        self.wait()
        if self._output is not None:
            with self._stopwatch.measure("saving"):
                self._output.write_rest()

    def close(self) -> None:
        """Ends the thread. A finished block is still written, with its state; nothing else is begun."""
        for future in self._reads.values():
            future.cancel()
        self._io.shutdown(wait=True)

"""What a streamed run writes: the input's files with other weights in them, or shards of packed weights."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..models.checkpoint import INDEX, SINGLE, Checkpoint, CheckpointWriter, own_size
from ..models.placement import Placement
from ..models.save import PROCESSOR
from ..packed.model import (
    PackedReport,
    Packing,
    describe,
    head_of,
    pack_head,
    pack_matrix,
    packed_weights,
    refuse_nothing_packed,
    refuse_unroundable,
    set_config,
)
from ..pruning.blocks import Block, matrices_of
from .skeleton import outside_of, put, read


class Output(ABC):
    """Where blocks go as they are done, and at the end what lies outside of them. What a method wrote is on the disk
    when it returns; OSError says why it is not.

    Attributes:
        size: bytes that it takes, as far as that is known before.
    """

    size = 0

    @property
    def report(self) -> PackedReport | None:
        """Of what was packed."""
        return None

    @abstractmethod
    def files(self, done: int) -> set[str]:
        """The names of those that hold something of the first ``done`` blocks; others may go."""

    @abstractmethod
    def write_block(self, index: int, tensors: dict[str, Tensor]) -> None:
        """``tensors``: the block's, under their names in the model, on the CPU."""

    @abstractmethod
    def write_rest(self) -> None:
        """All that lies outside the blocks."""

    def state(self) -> dict[str, Any] | None:
        """What a run that goes on has to know of the blocks that are written, as plain data."""
        return None

    @abstractmethod
    def restore(self, done: int, state: Any) -> None:
        """Go on behind ``done`` blocks. Raises ValueError, TypeError, KeyError or AttributeError where the files are
        not what ``state`` says."""

    @abstractmethod
    def check_whole(self) -> None:
        """Raises OSError where a file has not the size, or lies no longer under the name, that it must have."""

    @abstractmethod
    def add_small_files(self) -> None:
        """What lies beside the weights."""

    @abstractmethod
    def close(self) -> None:
        """No file stays open."""


def copy_files(names: tuple[str, ...], source: Path, folder: Path) -> None:
    """Those of them that are there."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


class SameFiles(Output):
    """The input's: same shards, same names, same places in them."""

    def __init__(self, folder: Path, blocks: list[Block], placement: Placement) -> None:
        self._folder = folder
        self._placement = placement
        self._checkpoint = placement.checkpoint
        self._writer = CheckpointWriter(folder, placement.checkpoint)
        self._blocks = [placement.files_of(f"{block.name}.") for block in blocks]  # tensors of the files
        self.size = placement.checkpoint.size

    def files(self, done: int) -> set[str]:
        return set(self._checkpoint.files)

    def write_block(self, index: int, tensors: dict[str, Tensor]) -> None:
        for file in self._blocks[index]:
            if any(tensors[part.name].dtype != self._placement.dtype(file) for part in self._placement.files[file]):
                self._writer.copy(file)  # it was not pruned (refuse_other_dtypes)
            else:
                self._placement.write(file, tensors, self._writer)
        self._writer.sync()

    def write_rest(self) -> None:
        """Also the tensors that the model does not know."""
        in_blocks = {file for files in self._blocks for file in files}
        for file in self._checkpoint.entries:
            if file not in in_blocks:
                self._writer.copy(file)
        self._writer.create_all()
        self._writer.sync()

    def restore(self, done: int, state: Any) -> None:
        if state is not None:
            raise ValueError(f"it speaks of packed weights: {str(state)[:100]}")
        self._writer.check_written(file for files in self._blocks[:done] for file in files)

    def check_whole(self) -> None:
        self._writer.check_whole()

    def add_small_files(self) -> None:
        index = [self._checkpoint.index] if self._checkpoint.index else []
        names = ("config.json", "generation_config.json", *PROCESSOR, *index)
        copy_files(names, self._checkpoint.folder, self._folder)

    def close(self) -> None:
        self._writer.close()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Inside, transformers shows no progress bars."""
    from transformers.utils import logging

    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


class PackedShards(Output):
    """One shard for each block, one for what lies outside of them, and one for an output embedding of its own.

    A shard is what ``save_pretrained`` writes of its tensors, under the names that it gives them: together they are
    what it writes of the packed model in memory. The model's modules become packed ones block by block, and hold no
    data once they are written.

    Args:
        folder: to write to. ``temporary``: a folder beside it, for a shard that is not whole.
        model: on the meta device, with its ``blocks`` and the ``placement`` of its tensors in the input.
        packing: how weights are packed.

    Raises:
        ValueError: the output layer cannot be packed as ``packing`` says.
    """

    def __init__(
        self,
        folder: Path,
        temporary: Path,
        model: Any,
        blocks: list[Block],
        placement: Placement,
        packing: Packing,
    ) -> None:
        from transformers import GenerationConfig

        self._folder, self._temporary = folder, temporary
        self._model, self._blocks, self._placement, self._packing = model, blocks, placement, packing
        self._outside = [groups for groups in outside_of(model, blocks) if groups]
        count = len(blocks) + len(self._outside)
        self._shards = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        self._head = None if packing.head_kind is None else head_of(model)
        self._report = PackedReport({}, {}, 0, 0)
        if (placement.checkpoint.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(placement.checkpoint.folder)
        # As from_pretrained does, by which the names are chosen that a model is saved under.
        model._weight_conversions = placement.conversions
        if self._head is not None:  # before the work, not after it
            weight = f"{self._head}.weight"
            names = next(names for groups in self._outside for names in groups if weight in names)
            refuse_unroundable([(self._head, read(model, names, placement))])

    @property
    def report(self) -> PackedReport:
        return self._report

    def files(self, done: int) -> set[str]:
        return set(self._shards[:done])

    def write_block(self, index: int, tensors: dict[str, Tensor]) -> None:
        block = self._blocks[index]
        for name, tensor in tensors.items():
            put(self._model, name, tensor)
        matrices = matrices_of([block])
        if self._packing.kind is not None:
            refuse_unroundable((name, matrix.stored) for name, matrix in matrices.items())
        for name, matrix in matrices.items():
            pack_matrix(self._model, name, matrix, self._packing, self._report)
        self._write(self._shards[index], block.module.state_dict(prefix=f"{block.name}."))
        block.module.to("meta")

    def write_rest(self) -> None:
        refuse_nothing_packed(self._model, self._packing, self._report)
        in_blocks = tuple(f"{block.name}." for block in self._blocks)
        for shard, groups in zip(self._shards[len(self._blocks) :], self._outside, strict=True):
            for names in groups:
                tensor = read(self._model, names, self._placement)
                for name in names:
                    put(self._model, name, tensor)
            if self._head is not None and any(f"{self._head}.weight" in names for names in groups):
                pack_head(self._model, self._head, self._packing, self._report)
            set_config(self._model, describe(self._model))
            held = {name: t for name, t in self._model.state_dict().items() if not t.is_meta}
            self._write(shard, {name: t for name, t in held.items() if not name.startswith(in_blocks)})
            self._model.to("meta")
        made = Checkpoint(self._folder, self._shards)
        size = sum(entry.size for entry in made.entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": {name: e.file for name, e in made.entries.items()}}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _write(self, shard: str, tensors: dict[str, Tensor]) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        try:
            with _without_bars():  # one for each shard
                self._model.save_pretrained(self._temporary, state_dict=tensors, max_shard_size=2**62)
        except SafetensorError as error:
            raise OSError(f"{self._folder / shard} could not be written: {error}") from error
        fd = os.open(self._temporary / SINGLE, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        (self._temporary / SINGLE).replace(self._folder / shard)
        for path in self._temporary.iterdir():  # config.json above all: the last one counts
            path.replace(self._folder / path.name)

    def state(self) -> dict[str, Any]:
        return {"layers": describe(self._model), "dense": self._report.dense}

    def restore(self, done: int, state: Any) -> None:
        from ..packed.quantizer import WandaPackedConfig, put_empty  # which transformers imports, too

        layers, dense = state["layers"], state["dense"]
        if layers:
            WandaPackedConfig(layers)
        matrices = matrices_of(self._blocks[:done])
        if any(type(why) is not str for why in dense.values()) or sorted([*layers, *dense]) != sorted(matrices):
            raise ValueError(f"it speaks of {len(layers)} packed layers and {len(dense)} dense ones, or of others")
        for name, layer in layers.items():
            put_empty(self._model, name, layer)
        packed = packed_weights(self._model)
        for name, matrix in matrices.items():
            self._report.add(name, matrix.stored, packed.get(name), dense.get(name))
        for shard, block in zip(self._shards, self._blocks[:done], strict=False):
            own_size(self._folder / shard)
            held = sum(entry.size for entry in Checkpoint(self._folder, [shard]).entries.values())
            wanted = sum(tensor.nbytes for tensor in block.module.state_dict().values())
            if held != wanted:
                raise ValueError(f"{self._folder / shard} holds {held} bytes of tensors, {wanted} were written")

    def check_whole(self) -> None:
        try:
            Checkpoint(self._folder)
        except (ValueError, FileNotFoundError) as error:
            raise OSError(f"what was written did not stay: {error}") from error

    def add_small_files(self) -> None:
        copy_files(PROCESSOR, self._placement.checkpoint.folder, self._folder)

    def close(self) -> None:
        pass

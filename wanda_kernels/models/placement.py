"""Where each tensor of a checkpoint's files lies in the model, whose tensors may have other names and other shapes.

transformers renames what it loads (``WeightRenaming``), and makes tensors of the model out of several in the files, or
several out of one (``WeightConverter``: experts stacked, queries and keys taken apart, matrices transposed). Its own
functions match the names here, and its operations are run on tensors without data, and watched (:mod:`.watch`): so none
of them has to be known, and one that computes, and does not only move, is refused by its name.
"""

from __future__ import annotations

import itertools
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import DTYPES, Checkpoint, CheckpointWriter
from .watch import View, Watch


@dataclass(frozen=True)
class Target:
    """What a tensor of the files becomes: ``name`` in the model, where ``converter`` (None: it is only renamed) makes
    that, and perhaps others, of all tensors that go there. ``pattern``: which of its sources this one is."""

    name: str
    converter: Any = None
    pattern: str | None = None


def targets(model: Any, checkpoint: Checkpoint, conversions: list[Any] | None = None) -> dict[str, Target]:
    """What transformers makes of each tensor of the files, in the order in which it takes them. One that the model has
    no place for gets a name that the model does not have. ``conversions``: the model's, which note that they are used.

    Raises:
        ValueError: two tensors of the files have one place.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    own, prefix = model.state_dict(), model.base_model_prefix
    conversions = get_model_conversion_mapping(model) if conversions is None else conversions
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Target] = {}
    taken: dict[str, str] = {}
    for name in sorted(checkpoint.entries, key=dot_natural_key):
        there, pattern = rename_source_key(name, renamings, converters, prefix, own)
        if there not in own and name in own:
            there, pattern = rename_source_key(name, [], [], prefix, own)
        target = found[name] = Target(there, None if pattern is None else by_pattern[pattern], pattern)
        other = taken.setdefault(there, name)
        if other != name and (target.converter is None or target.converter is not found[other].converter):
            raise ValueError(f"model {checkpoint.folder} holds {there} twice: as {other} and as {name}")
    return found


@dataclass(frozen=True)
class Part:
    """``there``, in the tensor ``file`` of the files, is ``here`` in the model's tensor ``name``: of one shape."""

    file: str
    there: View
    name: str
    here: View


class Placement:
    """The parts that a model is made of, and their way from the files into memory and back.

    Args:
        model: of transformers, on the meta device.
        checkpoint: its files.

    Attributes:
        checkpoint: as given.
        parts: of each tensor of the model that the files hold; together they are the whole tensor.
        files: tensors of the files -> their parts.
        left: tensors of the files that the model has no place for.
        conversions: of transformers, those among the model's that the files need.

    Raises:
        ValueError: a tensor that the files hold twice, in part, or in another shape; an operation of transformers that
            does more than move.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.checkpoint = checkpoint
        self._own: dict[str, Tensor] = model.state_dict()
        self.parts: dict[str, list[Part]] = {}
        self.left: list[str] = []
        joined: dict[str, dict[str, Target]] = {}
        conversions = get_model_conversion_mapping(model)
        for file, target in targets(model, checkpoint, conversions).items():
            if target.name not in self._own:
                self.left.append(file)
            elif target.converter is None:
                whole = View.of(self._empty(file))
                self._add(target.name, [Part(file, whole, target.name, whole)], whole.shape)
            else:
                joined.setdefault(target.name, {})[file] = target
        self.conversions = [conversion for conversion in conversions if conversion.was_used()]
        for name, sources in joined.items():
            self._convert(model, name, sources)
        self.files: dict[str, list[Part]] = {}
        for part in itertools.chain(*self.parts.values()):
            self.files.setdefault(part.file, []).append(part)

    def _empty(self, file: str) -> Tensor:
        return torch.empty(self.checkpoint.entries[file].shape, device="meta")

    def _add(self, name: str, parts: list[Part], shape: tuple[int, ...]) -> None:
        file = parts[0].file
        if name in self.parts:
            first = self.parts[name][0].file
            raise ValueError(f"{self.checkpoint.folder} holds {name} twice: as {first} and as {file}")
        if name not in self._own:
            raise ValueError(f"{file} would become {name}, which is not in the model")
        own = self._own[name]
        if shape != tuple(own.shape):
            what = file if len(parts) == 1 else f"what {file} and others make of {name}"
            raise ValueError(
                f"{what} is {self.checkpoint.entries[file].dtype} {list(shape)} in the checkpoint and {own.dtype} "
                f"{list(own.shape)} in the model: it cannot be streamed"
            )
        if sum(part.here.numel for part in parts) != own.numel():
            raise ValueError(f"{name} is not wholly in the files")
        self.parts[name] = parts

    def _convert(self, model: Any, name: str, sources: dict[str, Target]) -> None:
        converter = deepcopy(next(iter(sources.values())).converter)
        tensors = {file: self._empty(file).to(self._own[name].dtype) for file in sources}
        for file, target in sources.items():
            converter.add_tensor(name, file, target.pattern, tensors[file])
        try:
            with torch.no_grad(), Watch(tensors) as watch:
                made = converter.convert(name, model=model, config=model.config)
            values = {there: value[0] if isinstance(value, list) else value for there, value in made.items()}
            moves = {there: watch.moves(value) for there, value in values.items()}
        except Exception as error:  # whatever operations raise that find too few tensors, or others
            operations = ", ".join(type(operation).__name__ for operation in converter.operations)
            raise ValueError(
                f"the operation {operations} that transformers applies to {next(iter(sources))} is not known: {error}"
            ) from error
        for there, value in values.items():
            self._add(there, [Part(file, x, there, y) for y, file, x in moves[there]], tuple(value.shape))

    def files_of(self, prefix: str) -> list[str]:
        """The tensors of the files that make the model's tensors whose names begin with ``prefix``.

        Raises:
            ValueError: one of them holds something else too.
        """
        mine = [part.file for name, parts in self.parts.items() if name.startswith(prefix) for part in parts]
        for file in dict.fromkeys(mine):
            parts = [part for part in self.files[file] if part.name.startswith(prefix)]
            if sum(part.there.numel for part in parts) != math.prod(self.checkpoint.entries[file].shape):
                raise ValueError(f"{file} holds {parts[0].name} and more than {prefix}*: it cannot be streamed")
        return list(dict.fromkeys(mine))

    def dtype(self, file: str) -> torch.dtype | None:
        return DTYPES.get(self.checkpoint.entries[file].dtype)

    def read(self, name: str, into: Tensor) -> None:
        """The model's tensor ``name``, into a contiguous CPU tensor of its shape, whatever its dtype. What is not one
        piece in the file takes memory: of a tensor of the files."""
        for part in self.parts[name]:
            here, kind = part.here.within(into), self.dtype(part.file)
            assert kind is not None
            begin = part.there.offset * kind.itemsize
            if not part.there.is_contiguous:
                here.copy_(part.there.within(self.checkpoint.load(part.file)))
            elif part.here.is_contiguous and kind == into.dtype:
                self.checkpoint.read(part.file, here, begin)
            else:
                there = torch.empty(part.there.shape, dtype=kind)
                self.checkpoint.read(part.file, there, begin)
                here.copy_(there)

    def write(self, file: str, tensors: dict[str, Tensor], writer: CheckpointWriter) -> None:
        """A tensor of the files, from the contiguous CPU tensors of the model that hold its parts, of its dtype. What
        is not one piece takes memory, as for :meth:`read`."""
        parts = self.files[file]
        if all(part.there.is_contiguous and part.here.is_contiguous for part in parts):
            for part in parts:
                here = part.here.within(tensors[part.name])
                writer.write(file, here, part.there.offset * here.itemsize)
            return
        whole = torch.empty(self.checkpoint.entries[file].shape, dtype=self.dtype(file))
        for part in parts:
            part.there.within(whole).copy_(part.here.within(tensors[part.name]))
        writer.write(file, whole)

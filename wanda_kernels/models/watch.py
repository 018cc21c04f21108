"""What operations on tensors move where: seen by running them on tensors without data.

A view of a tensor shares its storage, and says by its strides what it is: nothing has to be written down. What makes a
new storage out of others, element by element (``cat``, ``stack``, ``clone``), is. Every other operation computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
NO_STRIDES = "it moves elements in a way that has no strides"


@dataclass(frozen=True)
class View:
    """Some elements of a contiguous tensor, as ``as_strided`` takes them."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def within(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        return torch.empty_strided(self.shape, self.stride, device="meta").is_contiguous()


@dataclass(frozen=True)
class _Copied:
    """``source`` was copied to where ``corner`` is, in a contiguous tensor of ``shape``, of as many dimensions."""

    shape: tuple[int, ...]
    corner: list[int]
    source: Tensor


class Watch(TorchDispatchMode):
    """Watches operations, while it is active.

    Args:
        tensors: contiguous, on the meta device, each with a storage of its own, by their names.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._named = {_storage(tensor): name for name, tensor in tensors.items()}
        self._copied: dict[int, list[_Copied]] = {}
        self._alive: list[Tensor] = list(tensors.values())  # a storage that is gone may lend its address to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._alive += outputs
        known = {_storage(tensor) for tensor in inputs}
        if all(_storage(output) in known for output in outputs) and not func._schema.is_mutable:
            return made
        copied = []
        if func in (aten.cat.default, aten.stack.default):
            dim = (args[1] if len(args) > 1 else (kwargs or {}).get("dim", 0)) % made.dim()
            begin = 0
            for source in args[0]:
                piece = source.unsqueeze(dim) if func is aten.stack.default else source
                corner = [0] * made.dim()
                corner[dim], begin = begin, begin + piece.shape[dim]
                copied.append(_Copied(tuple(made.shape), corner, piece))
        elif func is aten.clone.default:
            copied.append(_Copied(tuple(made.shape), [0] * made.dim(), args[0]))
        if not copied or not made.is_contiguous():
            raise ValueError(f"it computes {func}")
        self._copied[_storage(made)] = copied
        return made

    def moves(self, value: Tensor) -> list[tuple[View, str, View]]:
        """What a tensor that was made consists of: a view of it (as a contiguous tensor), the name of one of the first
        tensors, and the view of that which was moved there."""
        here = torch.empty(value.shape, device="meta")
        return [(View.of(part), name, View.of(source)) for part, name, source in self._moves(here, value)]

    def _moves(self, here: Tensor, value: Tensor) -> Iterator[tuple[Tensor, str, Tensor]]:
        name = self._named.get(_storage(value))
        if name is not None:
            yield here, name, value
            return
        for copied in self._copied[_storage(value)]:
            for part, source in _through(here, value, copied):
                yield from self._moves(part, source)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _through(here: Tensor, value: Tensor, copied: _Copied) -> Iterator[tuple[Tensor, Tensor]]:
    """What of ``value``, a view of the tensor that ``copied`` was copied to, came from there: nothing, or a part of
    ``here``, which has the shape of ``value``, and the view of ``copied.source`` that it was."""
    shape, source = copied.shape, copied.source
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    wide = [dim for dim, size in enumerate(shape) if size > 1]
    corner, left = [0] * len(shape), int(value.storage_offset())  # of its first element
    for dim in wide:
        corner[dim], left = divmod(left, strides[dim])
    here, steps = _aligned(here, value, shape, strides, wide)
    begin, end = [0] * here.dim(), list(here.shape)
    for dim in wide:
        low, high = copied.corner[dim], copied.corner[dim] + source.shape[dim]
        along = [i for i, (other, step) in enumerate(steps) if other == dim and step]
        last = corner[dim] + sum((here.shape[i] - 1) * steps[i][1] for i in along)
        if last < low or corner[dim] >= high:
            return
        if corner[dim] >= low and last < high:
            continue
        if len(along) != 1 or last >= shape[dim]:
            raise ValueError(NO_STRIDES)
        (i,) = along
        begin[i] = max(0, -((corner[dim] - low) // steps[i][1]))
        end[i] = min(here.shape[i], -((corner[dim] - high) // steps[i][1]))
    offset = int(source.storage_offset())
    for dim in range(source.dim()):
        offset += (corner[dim] - copied.corner[dim]) * source.stride(dim)
    for i, (dim, step) in enumerate(steps):
        offset += begin[i] * step * source.stride(dim)
        here = here.narrow(i, begin[i], max(0, end[i] - begin[i]))
    if here.numel():
        yield here, source.as_strided(here.shape, [step * source.stride(dim) for dim, step in steps], offset)


def _aligned(
    here: Tensor, value: Tensor, shape: tuple[int, ...], strides: list[int], wide: list[int]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """``here``, seen with more dimensions, so that along each of them ``value`` goes along one dimension of ``shape``;
    and that dimension, and the step."""
    steps: list[tuple[int, int]] = []  # from the last to the first
    left = list(zip(value.shape, value.stride(), strict=True))
    while left:
        size, stride = left.pop()
        if size == 1:
            steps.append((0, 0))
            continue
        dim = next((dim for dim in wide if strides[dim] <= stride), None)
        if dim is None or stride % strides[dim]:
            raise ValueError(NO_STRIDES)
        step = stride // strides[dim]
        inner = shape[dim] // step
        if size > inner:  # it goes on in the dimension before
            if inner < 2 or size % inner or shape[dim] % step:
                raise ValueError(NO_STRIDES)
            here = here.unflatten(len(left), (size // inner, inner))
            left.append((size // inner, stride * inner))
        steps.append((dim, step))
    return here, steps[::-1]

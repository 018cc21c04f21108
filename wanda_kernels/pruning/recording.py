"""Records how the model calls its blocks, so that the driver can call them one by one.

Each block keeps the arguments of its own: masks and rotary embeddings may differ by layer (Gemma's sliding and full
attention). Nothing is sized by ``max_position_embeddings``, and equal tensors of different batches are kept once.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .matrices import Block
from .stand_ins import stand_ins


class _BlocksDoneError(Exception):
    """Ends the recording forward pass where the output embedding begins: it is not needed, and large."""


@dataclass(eq=False)
class More:
    """What a block gives beside its hidden states: the ``value`` is that of its last run. Stands for it in the next
    block's arguments."""

    value: Any = None


@dataclass(frozen=True)
class Call:
    """One call of a block on so many ``sequences``: its arguments without the hidden states that come first, and what
    it ``gives`` beside them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sequences: int
    gives: tuple[More, ...] = ()

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that ``module`` makes of ``hidden``."""
        args, kwargs = [_filled(value) for value in self.args], {key: _filled(v) for key, v in self.kwargs.items()}
        output = module(hidden, *args, **kwargs)
        if not isinstance(output, tuple | list):
            return output
        for more, value in zip(self.gives, output[1:], strict=False):
            more.value = value
        return output[0]


def _filled(value: Any) -> Any:
    return value.value if isinstance(value, More) else value


@dataclass
class Recording:
    """``hidden[batch]``: the first block's input. ``calls[block][batch]``: how the block was called."""

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    def blocks_hand_on_more(self) -> bool:
        """Whether blocks give later ones more than hidden states: by what they return, or through a mapping that
        several are called with, as Gemma 4's shared keys and values."""
        for batch in zip(*self.calls, strict=True):
            found: dict[int, int] = {}
            for call in batch:
                for value in (*call.args, *call.kwargs.values()):
                    if isinstance(value, More):
                        return True
                    if isinstance(value, MutableMapping):
                        found[id(value)] = found.get(id(value), 0) + 1
            if any(count > 1 for count in found.values()):
                return True
        return False


def run_block(block: Block, hidden: Tensor, call: Call) -> Tensor:
    """One block on one batch: [sequences, tokens, hidden] in and out; some models have more in front."""
    return call.run(block.module, hidden)


def record_calls(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Tensor],
    keep: Callable[[Tensor], None] | None = None,
) -> Recording:
    """Run embedding and preparation of each batch of ``input_ids``; the blocks only note how they are called.

    The pass goes on to the output embedding, so that a model that runs its blocks more than once is found out. The
    first block's inputs go to ``keep``, where it is given, and else to ``Recording.hidden``.

    Raises:
        ValueError: the model does not call each block exactly once, in order, or wants more of a block than its hidden
            states.
    """
    recording = Recording(calls=[[] for _ in blocks])
    keep_first = keep or recording.hidden.append
    returned = 0
    for number, input_ids in enumerate(batches):
        if number == 0:
            hidden, calls, returned = _record_first(model, blocks, input_ids)
        else:
            hidden, calls = _record(model, blocks, input_ids, returned)
        keep_first(hidden)
        for block_calls, call in zip(recording.calls, calls, strict=True):
            block_calls.append(call)
        _share_with_first_batch(recording)
    return recording


def _record_first(model: nn.Module, blocks: Sequence[Block], input_ids: Tensor) -> tuple[Tensor, list[Call], int]:
    """As :func:`_record`, with what blocks have to return: some models take all of it, some the first with [0], some
    two or three in a tuple."""
    first_error: ValueError | None = None
    for returned in range(4):
        try:
            return *_record(model, blocks, input_ids, returned), returned
        except ValueError as error:
            first_error = first_error or error  # the better one
    assert first_error is not None
    raise first_error from first_error.__cause__


def _record(model: nn.Module, blocks: Sequence[Block], input_ids: Tensor, returned: int) -> tuple[Tensor, list[Call]]:
    """The first block's input on one batch, and how each block was called. Raises as :func:`record_calls`.

    Args:
        returned: things in the tuple that a block returns; 0: hidden states alone.
    """
    first: list[Tensor] = []
    calls: list[Call] = []
    order: list[int] = []

    def recorder(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, *rest = (kwargs.pop("hidden_states"), *args) if "hidden_states" in kwargs else args
            order.append(index)
            if not first:
                first.append(hidden)
            if not isinstance(hidden, Tensor) or hidden.shape != first[0].shape:
                raise TypeError("a block did not get hidden states of the first one's shape")
            gives = tuple(More() for _ in range(returned - 1))
            calls.append(Call(tuple(rest), kwargs, len(input_ids), gives))
            return (hidden, *gives) if returned else hidden

        return forward

    def stop(hidden: Any, *_args: Any, **_kwargs: Any) -> None:
        if first and not isinstance(hidden, Tensor):
            raise TypeError("the output embedding did not get hidden states")
        raise _BlocksDoneError

    recorders = [(block.module, recorder(index)) for index, block in enumerate(blocks)]
    head = model.get_output_embeddings()  # type: ignore[operator]
    with stand_ins([*recorders, *([(head, stop)] if head is not None else [])], without_hooks=True):
        try:
            model(input_ids=input_ids, use_cache=False)
        except _BlocksDoneError:
            pass
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if not order and isinstance(error, IndexError):
                positions = getattr(getattr(model, "config", None), "max_position_embeddings", "unknown")
                raise ValueError(
                    f"{type(model).__name__} cannot take input_ids of length {input_ids.shape[1]}: its positions "
                    f"(max_position_embeddings) are {positions}"
                ) from error
            if not order:
                raise
            raise ValueError(
                f"{type(model).__name__} wants more of its blocks than their hidden states: it cannot be pruned block "
                f"by block ({type(error).__name__}: {error})"
            ) from error
    if order != list(range(len(blocks))):
        shown = ", ".join(map(str, order[:12])) + (f", ... {len(order)} in all" if len(order) > 12 else "")
        raise ValueError(
            f"{type(model).__name__} does not call each of its {len(blocks)} blocks exactly once, in order (it calls "
            f"{shown or 'none'}): it cannot be pruned block by block"
        )
    return first[0], calls


def _share_with_first_batch(recording: Recording) -> None:
    """Replace tensors of the newest batch that equal the first batch's by those: masks add up otherwise."""
    seen: list[tuple[Tensor, Tensor]] = []

    def share(new: Any, old: Any) -> Any:
        if isinstance(new, Tensor) and isinstance(old, Tensor):
            for tensor, kept in seen:
                if tensor is new:
                    return kept
            same = new.dtype == old.dtype and new.device == old.device and torch.equal(new, old)
            kept = old if same else new
            seen.append((new, kept))
            return kept
        if isinstance(new, tuple | list) and type(new) is type(old) and len(new) == len(old):
            return type(new)(share(a, b) for a, b in zip(new, old, strict=True))
        if isinstance(new, dict) and isinstance(old, dict) and new:  # an empty one is for the blocks to fill
            return {key: share(value, old.get(key)) for key, value in new.items()}
        return new

    for calls in recording.calls:
        first, last = calls[0], calls[-1]
        calls[-1] = Call(share(last.args, first.args), share(last.kwargs, first.kwargs), last.sequences, last.gives)

"""Records how the model calls its blocks, so that the driver can call them one by one.

Each block keeps the arguments of its own: masks and rotary embeddings may differ by layer (Gemma's sliding and full
attention). Nothing is sized by ``max_position_embeddings``, and equal tensors of different batches are kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block


class _LastBlockReachedError(Exception):
    """Ends the recording forward pass: the final norm and lm_head are not needed."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block, without the hidden states that come first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Recording:
    """``hidden[batch]``: the first block's input. ``calls[block][batch]``: how the block was called."""

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)


def run_block(block: Block, hidden: Tensor, call: Call) -> Tensor:
    """One block on one batch: [sequences, tokens, hidden] in and out."""
    output = block.module(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


def record_calls(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Tensor],
    keep: Callable[[Tensor], None] | None = None,
) -> Recording:
    """Run embedding and preparation of each batch of ``input_ids``; the blocks only note how they are called.

    The first block's inputs go to ``keep``, where it is given, and else to ``Recording.hidden``.
    """
    recording = Recording(calls=[[] for _ in blocks])
    keep = keep or recording.hidden.append
    originals = [block.module.__dict__.get("forward") for block in blocks]

    def recorder(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden, *rest = (kwargs.pop("hidden_states"), *args) if "hidden_states" in kwargs else args
            if index == 0:
                keep(hidden)
            recording.calls[index].append(Call(tuple(rest), kwargs))
            if index == len(blocks) - 1:
                raise _LastBlockReachedError
            return hidden

        return forward

    try:
        for index, block in enumerate(blocks):
            block.module.forward = recorder(index)
        for number, input_ids in enumerate(batches):
            try:
                model(input_ids=input_ids, use_cache=False)
            except _LastBlockReachedError:
                _share_with_first_batch(recording)
            if any(len(calls) != number + 1 for calls in recording.calls):
                raise ValueError(
                    f"{type(model).__name__} does not call each of its {len(blocks)} blocks exactly once, in "
                    "order: it cannot be pruned block by block"
                )
    finally:
        for block, original in zip(blocks, originals, strict=True):
            del block.module.forward
            if original is not None:
                block.module.forward = original
    return recording


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
        if isinstance(new, dict) and isinstance(old, dict):
            return {key: share(value, old.get(key)) for key, value in new.items()}
        return new

    for calls in recording.calls:
        first, last = calls[0], calls[-1]
        calls[-1] = Call(share(last.args, first.args), share(last.kwargs, first.kwargs))

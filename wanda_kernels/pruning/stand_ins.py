"""Other forwards in place of modules' own, for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def stand_ins(forwards: Sequence[tuple[nn.Module, Any]], without_hooks: bool = False) -> Iterator[None]:
    """Other forwards in place of the modules' own, which come back whatever happens.

    Args:
        without_hooks: nor are the modules' hooks called: those that change a block's input do so when it really runs.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks") if without_hooks else ()
    originals = [
        {name: vars(module)[name] for name in ("forward", *hooks) if name in vars(module)} for module, _ in forwards
    ]
    try:
        for module, forward in forwards:
            module.forward = forward
            for name in hooks:
                setattr(module, name, OrderedDict())
        yield
    finally:
        for (module, _), original in zip(forwards, originals, strict=True):
            vars(module).pop("forward", None)
            vars(module).update(original)

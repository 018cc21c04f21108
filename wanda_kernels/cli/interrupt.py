"""Ctrl-C that cannot get lost.

A KeyboardInterrupt that arrives inside a callback or a library's import may be swallowed there, and the command would
go on to write its result. So the signal is remembered, and every step looks.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received = False


def _remember(_signal: int, _frame: FrameType | None) -> None:
    global _received
    _received = True
    raise KeyboardInterrupt


@contextmanager
def remembered() -> Iterator[None]:
    """Inside, a Ctrl-C is remembered for :func:`check`."""
    global _received
    _received = False
    before = signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def received() -> bool:
    """Whether a Ctrl-C came since the command began."""
    return _received


def check() -> None:
    """Raises KeyboardInterrupt where a Ctrl-C came since the command began."""
    if _received:
        raise KeyboardInterrupt

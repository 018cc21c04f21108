"""Ctrl-C, and a request to end (SIGTERM), that cannot get lost.

A KeyboardInterrupt that arrives inside a callback or a library's import may be swallowed there, and the command would
go on to write its result. So the signal is remembered, and every step looks.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_received = 0
_inside = False


def _remember(number: int, _frame: FrameType | None) -> None:
    global _received
    _received = number
    raise KeyboardInterrupt


@contextmanager
def remembered() -> Iterator[None]:
    """Inside, a signal is remembered for :func:`check`."""
    global _received, _inside
    _received, _inside = 0, True
    before = {number: signal.signal(number, _remember) for number in SIGNALS}
    try:
        yield
    finally:
        _inside = False  # what is asked of a command that ended does not end the next use of the package
        for number, handler in before.items():
            signal.signal(number, handler)


def received() -> int:
    """The signal that came since the command began, or 0."""
    return _received


def exit_code() -> int:
    """Of a command that was interrupted, as a shell has it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (_received or signal.SIGINT)


def check() -> None:
    """Raises KeyboardInterrupt where a signal came since the command began. Outside of one it does nothing."""
    if _inside and _received:
        raise KeyboardInterrupt

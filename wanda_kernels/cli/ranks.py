"""Commands that torchrun started: who speaks, and how a failure reaches the others. Imports torch only where needed."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from ..distributed import Processes

_joined: Processes | None = None


def launched() -> bool:
    """Whether torchrun (or what sets the same variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def prefix() -> str:
    """Of an error: which process it comes from, where there are several."""
    return f"rank {os.environ['RANK']}: " if launched() and os.environ["WORLD_SIZE"] != "1" else ""


def join(device: str) -> Processes | None:
    """The processes that torchrun started, None where it did not. All but the first are silent from now on."""
    global _joined
    if not launched():
        return None
    from ..distributed import join

    _joined = join(device)
    if not _joined.is_first:
        from .display import console

        console.quiet = True
    return _joined


def tell(failure: str) -> None:
    """The others why this process ends; their exchanges break."""
    if _joined is not None:
        _joined.leave(failure)


def end(code: int) -> NoReturn:
    """The end of the process. Of several, at once: one that had done its work was seen to abort, probably while the
    interpreter shut down ("terminate called without an active exception", gloo, torch 2.14)."""
    if _joined is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

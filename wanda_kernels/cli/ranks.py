"""Commands that torchrun started: who speaks, and how a failure reaches the others. Imports torch only where needed."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from ..distributed import Processes

GRACE_S = 10.0  # from the loss of another process to the end of this one, whatever it does

_joined: Processes | None = None


def launched() -> bool:
    """Whether torchrun (or what sets the same variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def prefix() -> str:
    """Of an error: which process it comes from, where there are several."""
    return f"rank {os.environ['RANK']}: " if launched() and os.environ["WORLD_SIZE"] != "1" else ""


def refuse(command: str) -> None:
    """Raises ValueError where several processes would do the same work, and write the same files."""
    if launched() and os.environ["WORLD_SIZE"] != "1":
        raise ValueError(f"{command} is for one process, torchrun started {os.environ['WORLD_SIZE']}")


def join(device: str, given: dict[str, Any]) -> Processes | None:
    """The processes that torchrun started, None where it did not. All but the first are silent from now on.

    Args:
        given: the command's options and what they name; a value that differs between processes is refused by its name.
    """
    global _joined
    if not launched():
        return None
    from ..distributed import join

    _joined = join(device, on_loss=_end_soon)
    if not _joined.is_first:
        from .display import console

        console.quiet = True
    _joined.refuse_differences(given)
    return _joined


def fingerprint(source: str) -> str:
    """What a model or a text is: of a file or a folder its content, of anything else its name."""
    from ..identity import of_file
    from ..models.checkpoint import INDEX, SINGLE, Checkpoint

    path = Path(source).expanduser()
    if path.is_file():
        return of_file(path)
    if not path.is_dir():
        return source
    # The large files by samples of each tensor, the small ones whole.
    parts = [f"{file.name} {of_file(file)}" for file in sorted(path.glob("*.json"))]
    if any((path / name).is_file() for name in (SINGLE, INDEX)):
        checkpoint = Checkpoint(path)
        parts += [f"{name} {value}" for name, value in checkpoint.fingerprints().items()]
        checkpoint.close()
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def fingerprint_of_sources(sources: Sequence[str]) -> str:
    """The same of calibration sources in their order, with their shares where there are several."""
    from ..text.sources import parse_sources

    parsed = parse_sources(sources)
    if len(parsed) == 1:
        return fingerprint(parsed[0].name)
    return ", ".join(f"{fingerprint(source.name)}={source.share}" for source in parsed)


def _end_soon(reason: str) -> None:
    """The main thread may be deep in a library, where no exception reaches it."""

    def end() -> None:
        print(f"wanda-kernels: error: {prefix()}{reason}", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(GRACE_S, end)
    timer.daemon = True
    timer.start()


def lost() -> str | None:
    """Why the run cannot go on, where another process failed or was killed: whatever error came of it here."""
    return None if _joined is None else _joined.lost


def tell(failure: str) -> None:
    """The others why this process ends; their exchanges break."""
    if _joined is not None:
        _joined.leave(failure)


def goodbye() -> None:
    """This process has done its share. Raises LostError where the first one, which saves, did not come so far."""
    if _joined is not None:
        _joined.goodbye()


def end(code: int) -> NoReturn:
    """The end of the process. Of several, at once: one that had done its work was seen to abort, probably while the
    interpreter shut down ("terminate called without an active exception", gloo, torch 2.14)."""
    if _joined is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

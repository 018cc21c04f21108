"""Streamed runs on the command line: what is said of an unfinished one, before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..pruning import PruningReport
    from ..pruning.report import Progress
    from .display import Bar
    from .session import Session

Resume = Annotated[bool, typer.Option("--resume", help="With --stream: go on with the run that ended before its end.")]


def check_streamed(model: str, stream: bool, resume: bool) -> None:
    """Raises ValueError for what does not go together."""
    if stream and not Path(model).expanduser().is_dir():
        raise ValueError(f"--stream needs a local folder with safetensors files, {model} is none")
    if resume and not stream:
        raise ValueError("--resume needs --stream")


def check_unfinished(out: Path, resume: bool, overwrite: bool, model: str) -> None:
    """Raises FileExistsError where an unfinished run is there, and nothing says what to do with it. Tells where there
    is none to go on with."""
    from ..streaming.run import check_leftovers, describe
    from .display import note

    check_leftovers(out, resume, overwrite, model)
    if resume and describe(out) is None:
        note(f"no unfinished run to {out}: beginning with the first block")


def stream(session: Session, out: Path, progress: Callable[[Bar], Progress], **how: Any) -> PruningReport:
    """A streamed run with a bar, on which ``progress`` draws; ``how``: as for :func:`wanda_kernels.stream_prune`."""
    from ..streaming import stream_prune
    from ..streaming.run import describe
    from .display import bar, note

    try:
        with bar() as shown:
            return stream_prune(session.name, out, tokenizer=session.tokenizer, progress=progress(shown), **how)
    except BaseException:
        left = describe(out)
        if left is not None:
            note(f"{left}: --resume goes on with it")
        raise

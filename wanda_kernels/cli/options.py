"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

_debug = False


class UsageError(ValueError):
    """Options that are wrong by themselves, whatever the model and the machine: exit code 2."""


@contextmanager
def usage() -> Iterator[None]:
    """Inside, options are checked: what the library refuses is wrong usage."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def debug_wanted() -> bool:
    return _debug


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = value
    return value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a local folder, or a .gguf file (dequantised).")]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to run.")]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", metavar="auto|float32|bfloat16|float16", help="Weights and activations; auto: the checkpoint's."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Sequences per forward pass. \\[default: by device and length]"),
]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show the traceback of an error.")
]


def check_length(length: int, config: object) -> None:
    """Raises ValueError where a window is longer than the model's context."""
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise ValueError(f"--length {length} is longer than the model's context of {limit} tokens")

"""Options that several commands share."""

from __future__ import annotations

import re
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


_NAMES = (
    "sparsity", "pattern", "method", "group", "variant", "weight_update", "block_size", "damping", "ria_power", "owl",
    "propagate", "batch_size", "exact_error", "fuse_statistics", "device", "dtype", "device_map", "offload",
    "experts", "min_tokens", "require_all", "refine", "refine_damping", "update", "update_damping",
    "update_steps", "share", "drop_experts", "activation_memory", "samples", "length", "pack", "column", "split",
    "seed", "calibration", "text", "values", "group_size", "head", "format",
)  # fmt: skip
_WORD = r"(?<![\w./-])({})(?![\w./:-])"  # no part of a path, nor a name of compared values


def of_options(message: str) -> str:
    """``message`` of the library, which speaks of arguments, in the words of the command line: ``resume=True`` is
    ``--resume``; a name is told by its underscore, or where the message begins with it."""
    message = re.sub(r"\b([a-z_]+)=True\b", lambda m: _flag(m[1]), message)
    message = re.sub(r"\b([a-z_]+)=False\b", lambda m: _flag(m[1]).replace("--", "--no-", 1), message)
    with_underscore = "|".join(name for name in _NAMES if "_" in name)
    message = re.sub(_WORD.format(with_underscore), lambda m: _flag(m[1]), message)
    return re.sub(rf"^({'|'.join(_NAMES)}) (?=must |is |for |chooses |puts )", lambda m: f"{_flag(m[1])} ", message)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def debug_wanted() -> bool:
    return _debug


def _set_debug(value: bool) -> bool:
    global _debug
    _debug = value
    return value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a local folder, or a .gguf file (dequantised).")]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to run.")]
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
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="c4|wikitext2|HUB_ID|FILE[=SHARE]",
        help="Calibration data: a data set (owner/name or owner/name:configuration of the hub), a text file, a "
        ".jsonl file, or a .safetensors file with input_ids \\[samples, length], int64. Several, each with its own "
        "--calibration, are mixed: in equal parts, or by a share as in notes.txt=0.75. \\[default: c4]",
    ),
]
CALIBRATION = ["c4"]
Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="wikitext2|FILE",
        help="What to evaluate on; several, each with its own --text, one after the other. \\[default: wikitext2]",
    ),
]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Calibration sequences. \\[default: 128]")]
Length = Annotated[int | None, typer.Option("--length", min=2, help="Tokens in each of them. \\[default: 2048]")]
Pack = Annotated[
    bool, typer.Option("--pack", help="Put documents together; otherwise those shorter than --length are skipped.")
]
Column = Annotated[str, typer.Option("--column", help="Of a data set or .jsonl file: holds the text.")]
Split = Annotated[str, typer.Option("--split", help="Of a data set of the hub.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the drawing of calibration sequences.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show the traceback of an error.")
]


def check_texts(given: list[str] | None) -> list[str]:
    """The texts to evaluate on. Raises ValueError where one is named twice."""
    texts = given or ["wikitext2"]
    for number, text in enumerate(texts):
        if text in texts[:number]:
            raise ValueError(f"--text must name each text once, got {text} twice")
    return texts


def check_length(length: int, config: object) -> None:
    """Raises ValueError where a window is longer than the model's context."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise ValueError(f"--length {length} is longer than the model's context of {limit} tokens")

"""Calibration sequences from documents: one window of each that is long enough, or all of them packed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import read_text
from .windows import tokenize


def read_jsonl(path: Path, column: str) -> list[str]:
    """The texts of a JSONL file: an object a line, its text in ``column``. Empty lines are skipped.

    Raises:
        ValueError: naming the line, where it is no object with a text in ``column``; as :func:`read_text`.
    """
    documents = []
    # not splitlines(), which also splits at characters that a text in a line may have (U+2028, form feed, ..)
    for number, line in enumerate(read_text(path, "calibration").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, strict=False)  # a text may hold control characters that nobody escaped
        except (ValueError, RecursionError) as error:
            raise ValueError(f"calibration file {path}, line {number} is not JSON: {error}") from error
        documents.append(text_of(row, column, f"calibration file {path}, line {number}"))
    return documents


def text_of(row: Any, column: str, where: str) -> str:
    """Raises ValueError where ``row`` has no text in ``column``, with the columns it has, or one that is no Unicode."""
    if isinstance(row, dict) and column in row and not isinstance(row[column], str):
        raise ValueError(f"{where} has a {type(row[column]).__name__} in column '{column}', it must be text")
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        there = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where} has no text in column '{column}' (it has: {there}): name another column")
    text: str = row[column]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a surrogate pair in column '{column}' (character {error.start})") from error
    return text


def shuffled(documents: list[str], seed: int) -> Iterator[str]:
    return iter(random.Random(seed).sample(documents, len(documents)))


def draw_windows(
    documents: Iterable[str], tokenizer: Any, samples: int, length: int, seed: int, pack: bool, source: str
) -> Tensor:
    """``samples`` windows of ``length`` tokens from ``documents``, taken in their order: [samples, length], int64.

    Without ``pack``, a random window of each document with more than ``length`` tokens, as the official code takes
    them from c4; shorter ones are skipped. With it, all documents one after the other, the tokenizer's end-of-text
    token between them, cut into windows.

    Raises:
        ValueError: where the documents do not suffice, with what there is.
    """
    if samples < 1 or length < 2:
        raise ValueError(f"samples must be at least 1 and length at least 2, got {samples} and {length}")
    draw = random.Random(seed)
    end = getattr(tokenizer, "eos_token_id", None)
    separator = torch.tensor([] if end is None else [end], dtype=torch.int64)
    windows: list[Tensor] = []
    rest = torch.empty(0, dtype=torch.int64)
    read = 0
    for text in documents:
        ids = tokenize(tokenizer, text)
        read += 1
        if pack:
            rest = torch.cat([rest, ids, separator])
            whole = len(rest) // length * length
            windows += rest[:whole].view(-1, length)
            rest = rest[whole:]
        elif len(ids) > length:
            begin = draw.randint(0, len(ids) - length - 1)
            windows.append(ids[begin : begin + length])
        if len(windows) >= samples:
            return torch.stack(windows[:samples])
    what = (
        f"packed, {read} documents make {len(windows)} windows"
        if pack
        else (f"{len(windows)} of {read} documents are longer than {length} tokens")
    )
    advice = "lower samples or length" + ("" if pack else ", or put documents together (pack)")
    raise ValueError(f"calibration data {source}: {what}, {samples} samples of {length} are required: {advice}")

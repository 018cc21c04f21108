"""Calibration sequences: c4 or wikitext2 as the paper draws them, documents, a text file, or ready token ids; or a
mixture of them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import hub
from .files import check_regular, read_jsonl, read_text, text_of
from .sources import parse_sources, split_samples
from .windows import TextWithBos, draw_windows, sample_windows, tokenize

SAMPLES = 128
LENGTH = 2048
FILES = {".txt", ".md", ".json", ".jsonl", ".csv", ".gz", ".parquet", ".safetensors"}  # no hub id ends so
HUB_ID = r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?"  # owner/name, and a configuration


def load_calibration(
    source: str | Sequence[str],
    tokenizer: Any,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    *,
    pack: bool = False,
    column: str = "text",
    split: str = "train",
    bos: bool = False,
) -> Tensor:
    """Calibration sequences, [samples, length], int64.

    Args:
        source: ``c4``, ``wikitext2``, ``owner/name`` or ``owner/name:configuration`` of a data set on the hub, a
            ``.jsonl`` file, a text file, or a ``.safetensors`` file with ``input_ids`` [samples, length], int64. Or
            several of them, with their shares of the samples where these are not equal:
            ``["notes.txt=0.75", "c4=0.25"]`` (:func:`wanda_kernels.text.sources.parse_sources`). Each is drawn from
            with ``seed``; their sequences follow one another in the order given.
        tokenizer: of the model; not used for ``.safetensors``.
        samples: of all sources together, 128 if None (of a ``.safetensors`` file alone: all).
        length: tokens per sequence, 2048 if None (where a ``.safetensors`` file is among them: as its are).
        seed: of the drawing.
        pack: (c4, hub, ``.jsonl``) put documents together; otherwise those that are too short are skipped.
        column: (hub, ``.jsonl``) which holds the text.
        split: (hub) of the data set.
        bos: begin every sequence with the tokenizer's BOS token, which is one of its ``length``; Gemma needs it
            (:func:`wanda_kernels.text.windows.needs_bos`). ``.safetensors`` are left as they are.

    Raises:
        ValueError: ``pack`` for what has no documents; a text that is too short; token ids of the wrong shape or dtype;
            shares that are none, or leave a source without a sample; lengths that differ.
        FileNotFoundError, OSError, ImportError: a source that cannot be had.
    """
    sources = parse_sources(source)
    how = (seed, pack, column, split, bos)
    if len(sources) == 1:
        return _load(sources[0].name, tokenizer, samples, length, *how)
    counts = split_samples(SAMPLES if samples is None else samples, sources)
    parts: dict[str, Tensor] = {}
    found = length
    # files of ids first: without a length they say how long the others' sequences are
    for one, count in sorted(zip(sources, counts, strict=True), key=lambda pair: not pair[0].is_file_of_ids):
        ids = _load(one.name, tokenizer, count, length if one.is_file_of_ids else found, *how)
        if found is not None and ids.shape[1] != found:
            raise ValueError(
                f"calibration must have sequences of one length, got {found} in {next(iter(parts))} and "
                f"{ids.shape[1]} in {one.name}: give a length that both have"
            )
        parts[one.name], found = ids, ids.shape[1]
    return torch.cat([parts[one.name] for one in sources])


def check_sources(source: str | Sequence[str], samples: int | None) -> None:
    """Raises ValueError for sources, shares and samples that do not go together; reads none of them."""
    sources = parse_sources(source)
    if len(sources) > 1:
        split_samples(SAMPLES if samples is None else samples, sources)


def expected_length(source: str | Sequence[str], length: int | None) -> int | None:
    """Tokens per sequence that :func:`load_calibration` will give; None where a ``.safetensors`` file will tell."""
    if length is None and any(one.is_file_of_ids for one in parse_sources(source)):
        return None
    return LENGTH if length is None else length


def _load(
    source: str,
    tokenizer: Any,
    samples: int | None,
    length: int | None,
    seed: int,
    pack: bool,
    column: str,
    split: str,
    bos: bool,
) -> Tensor:
    """Of one source."""
    path = Path(source).expanduser()
    named = re.fullmatch(HUB_ID, source) if not path.exists() and path.suffix not in FILES else None
    if pack and not (source == "c4" or path.suffix == ".jsonl" or named):
        raise ValueError(f"pack puts documents together: calibration data {source} has none to tell apart")
    if path.suffix == ".safetensors":
        return _load_ids(path, samples, length)
    samples = SAMPLES if samples is None else samples
    length = LENGTH if length is None else length
    if bos:
        text = TextWithBos(tokenizer)
        return text.windows(_draw(source, path, named, text, samples, text.room(length), seed, pack, column, split))
    return _draw(source, path, named, tokenizer, samples, length, seed, pack, column, split)


def _draw(
    source: str,
    path: Path,
    named: re.Match[str] | None,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    pack: bool,
    column: str,
    split: str,
) -> Tensor:
    if source == "c4":
        return _draw_c4(tokenizer, samples, length, seed, pack)
    if source == "wikitext2":
        return _draw_wikitext2(tokenizer, samples, length, seed)
    if named:
        rows = hub.stream(named[1], named[2], split, seed)
        texts = (text_of(row, column, f"data set {source}") for row in rows)
        return draw_windows(texts, tokenizer, samples, length, seed, pack, source)
    if not path.exists():
        raise FileNotFoundError(
            f"calibration must be c4, wikitext2, a data set of the hub (owner/name) or a file; {source} does not exist"
        )
    if path.suffix == ".jsonl":
        documents = read_jsonl(path, column)
        shuffled = random.Random(seed).sample(documents, len(documents))
        return draw_windows(shuffled, tokenizer, samples, length, seed, pack, source)
    ids = tokenize(tokenizer, read_text(path, "calibration"))
    return sample_windows(ids, samples, length, seed, source)


def _load_ids(path: Path, samples: int | None, length: int | None) -> Tensor:
    check_regular(path, "calibration")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"calibration file {path} is not a safetensors file: {error}") from error
    if "input_ids" not in tensors:
        raise ValueError(f"calibration file {path} must hold input_ids, it holds: {', '.join(tensors) or 'nothing'}")
    ids = tensors["input_ids"]
    if ids.dtype != torch.int64 or ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"calibration file {path}: input_ids must be [samples, length], int64 and not empty, got "
            f"{list(ids.shape)}, {ids.dtype}"
        )
    for name, wanted, there in (("samples", samples, ids.shape[0]), ("length", length, ids.shape[1])):
        if wanted is not None and not 1 <= wanted <= there:
            raise ValueError(f"calibration file {path} has {name} {there}, {name} {wanted} was asked for")
    return ids[:samples, :length].contiguous()


def _draw_c4(tokenizer: Any, samples: int, length: int, seed: int, pack: bool) -> Tensor:
    """One random window of each of ``samples`` random documents that are long enough, as the official code has it."""
    documents = hub.load("c4", "train")
    draw = random.Random(seed)
    if pack:
        order = draw.sample(range(len(documents)), len(documents))
        texts = (documents[index]["text"] for index in order)
        return draw_windows(texts, tokenizer, samples, length, seed, True, "c4")
    windows: list[Tensor] = []
    tried = 0
    while len(windows) < samples:
        ids = tokenize(tokenizer, documents[draw.randint(0, len(documents) - 1)]["text"])
        tried += 1
        if len(ids) > length:
            begin = draw.randint(0, len(ids) - length - 1)
            windows.append(ids[begin : begin + length])
        elif not windows and tried >= 20000:
            raise ValueError(f"none of {tried} documents of c4 is longer than {length} tokens: lower length")
    return torch.stack(windows)


def _draw_wikitext2(tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """Random windows, which may overlap, of the training text, as the official code has it."""
    ids = tokenize(tokenizer, " ".join(hub.load("wikitext2", "train")["text"]))
    if len(ids) <= length:
        raise ValueError(f"wikitext2 has {len(ids)} tokens here, length {length} is too long")
    draw = random.Random(seed)
    begins = [draw.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return torch.stack([ids[begin : begin + length] for begin in begins])

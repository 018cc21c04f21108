"""Calibration sequences: c4 or wikitext2 as the paper draws them, a text file, or ready token ids."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from . import hub
from .windows import sample_windows

SAMPLES = 128
LENGTH = 2048


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a whole text: [tokens], int64. Special tokens as the tokenizer adds them."""
    # verbose=False: a text longer than the model's context is what is wanted here, not a mistake
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def read_text(path: Path, argument: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument} file {path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{argument} file {path} is empty")
    return text


def load_calibration(
    source: str, tokenizer: Any, samples: int | None = None, length: int | None = None, seed: int = 0
) -> Tensor:
    """Calibration sequences, [samples, length], int64.

    Args:
        source: ``c4``, ``wikitext2``, a text file, or a ``.safetensors`` file with ``input_ids`` [samples, length],
            int64.
        tokenizer: of the model; not used for ``.safetensors``.
        samples: 128 if None (of a ``.safetensors`` file: all).
        length: tokens per sequence, 2048 if None (of a ``.safetensors`` file: as they are).
        seed: of the drawing.

    Raises:
        ValueError: an empty or too short text; token ids of the wrong shape or dtype.
        FileNotFoundError, OSError, ImportError: a source that cannot be had.
    """
    if source.endswith(".safetensors"):
        return _load_ids(Path(source), samples, length)
    samples = SAMPLES if samples is None else samples
    length = LENGTH if length is None else length
    if source == "c4":
        return _draw_c4(tokenizer, samples, length, seed)
    if source == "wikitext2":
        return _draw_wikitext2(tokenizer, samples, length, seed)
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"calibration must be c4, wikitext2 or a file; {source} does not exist")
    ids = tokenize(tokenizer, read_text(path, "calibration"))
    return sample_windows(ids, samples, length, seed, source)


def _load_ids(path: Path, samples: int | None, length: int | None) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"calibration file {path} does not exist")
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
            raise ValueError(f"calibration file {path} has {name} {there}, --{name} {wanted} was asked for")
    return ids[:samples, :length].contiguous()


def _draw_c4(tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """One random window of each of ``samples`` random documents that are long enough, as the official code has it."""
    documents = hub.load("c4", "train")
    draw = random.Random(seed)
    windows: list[Tensor] = []
    tried = 0
    while len(windows) < samples:
        ids = tokenize(tokenizer, documents[draw.randint(0, len(documents) - 1)]["text"])
        tried += 1
        if len(ids) > length:
            begin = draw.randint(0, len(ids) - length - 1)
            windows.append(ids[begin : begin + length])
        elif not windows and tried >= 20000:
            raise ValueError(f"none of {tried} documents of c4 is longer than {length} tokens: lower --length")
    return torch.stack(windows)


def _draw_wikitext2(tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """Random windows, which may overlap, of the training text, as the official code has it."""
    ids = tokenize(tokenizer, " ".join(hub.load("wikitext2", "train")["text"]))
    if len(ids) <= length:
        raise ValueError(f"wikitext2 has {len(ids)} tokens here, --length {length} is too long")
    draw = random.Random(seed)
    begins = [draw.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return torch.stack([ids[begin : begin + length] for begin in begins])

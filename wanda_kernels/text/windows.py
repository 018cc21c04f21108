"""Cuts token ids, of a text or of documents, into windows of equal length."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a whole text: [tokens], int64. Special tokens as the tokenizer adds them."""
    # verbose=False: a text longer than the model's context is what is wanted here, not a mistake
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def split_windows(ids: Tensor, length: int) -> Tensor:
    """Consecutive windows that do not overlap, the rest dropped: [tokens] -> [tokens // length, length]."""
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, got {length}")
    return ids[: len(ids) // length * length].view(-1, length)


def needs_bos(config: Any) -> bool:
    """Whether a model of ``config`` reads text well only behind a BOS token: Gemma's kin. Gemma 3 270M has a
    perplexity of 82.7 on six windows of Python's help texts without one, of 28.2 with it (512 tokens each)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return "gemma" in str(getattr(text, "model_type", ""))


class TextWithBos:
    """A tokenizer for text that is cut into windows which each begin with BOS; by itself it adds no special token.

    Raises:
        ValueError: ``tokenizer`` has no BOS token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.bos_token_id is None:
            raise ValueError("bos puts the tokenizer's BOS token first, and this tokenizer has none")
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id

    def __call__(self, text: str, **options: Any) -> Any:
        return self._tokenizer(text, add_special_tokens=False, **options)

    def room(self, length: int) -> int:
        """Of a window of ``length`` tokens, those that are text."""
        if length < 3:
            raise ValueError(f"length must be at least 3 tokens, BOS and two of text, got {length}")
        return length - 1

    def windows(self, text: Tensor) -> Tensor:
        """[windows, length - 1] of text -> [windows, length]."""
        return torch.nn.functional.pad(text, (1, 0), value=self._tokenizer.bos_token_id)


def check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """Raises ValueError where ``ids`` hold a token that the model's embedding has no row for."""
    find: Any = getattr(model, "get_input_embeddings", None)  # of transformers' models
    if find is None or ids.numel() == 0:
        return
    size = find().weight.shape[0]
    low, high = (int(end) for end in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise ValueError(
            f"token ids must be 0 to {size - 1}, the model's vocabulary has {size}; got {low} to {high}: give ids of "
            "the model's own tokenizer"
        )


def sample_windows(ids: Tensor, samples: int, length: int, seed: int, source: str) -> Tensor:
    """``samples`` of the non-overlapping windows, drawn without repetition: [samples, length].

    Raises:
        ValueError: where the text is empty or too short, with what it has and what is needed.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    windows = split_windows(ids, length)
    if len(windows) < samples:
        raise ValueError(
            f"calibration text {source} has {len(ids)} tokens, {len(windows)} windows of {length}; {samples} "
            "samples are required: give a longer text, or lower samples or length"
        )
    chosen = random.Random(seed).sample(range(len(windows)), samples)
    return windows[sorted(chosen)]


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

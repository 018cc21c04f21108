"""Cuts token ids into windows of equal length."""

from __future__ import annotations

import random
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

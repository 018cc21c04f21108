"""Perplexity as the paper measures it: consecutive windows, exp of the mean loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..models import evaluating
from . import hub
from .files import read_text
from .windows import TextWithBos, check_vocabulary, split_windows, tokenize


def evaluation_ids(source: str, tokenizer: Any) -> Tensor:
    """Token ids of the text to evaluate on: ``wikitext2`` (the test split, as in the paper) or a text file."""
    if source == "wikitext2":
        return tokenize(tokenizer, "\n\n".join(hub.load("wikitext2", "test")["text"]))
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"text must be wikitext2 or a file; {source} does not exist")
    return tokenize(tokenizer, read_text(path, "text"))


def evaluation_windows(
    source: str, tokenizer: Any, length: int, count: int | None = None, *, bos: bool = False
) -> Tensor:
    """The first ``count`` (None: all) windows of the text to evaluate on, [windows, length], int64; ``bos``: each
    begins with the tokenizer's BOS token. Raises ValueError where the text is shorter than one."""
    text = TextWithBos(tokenizer) if bos else None
    ids = evaluation_ids(source, text or tokenizer)
    windows = split_windows(ids, text.room(length) if text else length)[:count]
    if len(windows) == 0:
        raise ValueError(f"text {source} has {len(ids)} tokens, one window needs {length}: lower length")
    return text.windows(windows) if text else windows


@torch.no_grad()
def perplexity(
    model: nn.Module,
    ids: Tensor,
    length: int,
    batch_size: int = 1,
    on_window: Callable[[int], None] | None = None,
) -> float:
    """exp of the mean over windows of the mean loss over a window's ``length - 1`` predictions.

    Args:
        model: a causal language model; evaluated without dropout, whatever mode it is in.
        ids: [tokens], int64, or windows [samples, length].
        length: tokens per window.
        batch_size: windows per forward pass.
        on_window: told how many windows are done after each batch.

    Returns:
        nan where a loss is (a broken model), inf where the figure is too large for a float.

    Raises:
        ValueError: fewer tokens than one window; token ids that are not in the model's vocabulary.

    Source: Wanda's reference code, ``lib/eval.py``.
    """
    if length < 2:
        raise ValueError(f"length must be at least 2, got {length}")
    if ids.dim() == 2 and ids.shape[1] != length:
        raise ValueError(f"ids of shape {list(ids.shape)} are windows of {ids.shape[1]} tokens, length is {length}")
    windows = ids if ids.dim() == 2 else split_windows(ids, length)
    if len(windows) == 0:
        raise ValueError(f"the text has {len(ids)} tokens, one window needs {length}: lower length")
    check_vocabulary(model, windows)
    device = next(model.parameters()).device
    total, done = 0.0, 0
    with evaluating(model):
        for batch in windows.split(batch_size):
            batch = batch.to(device)
            try:
                logits = model(input_ids=batch, use_cache=False).logits
            except IndexError as error:
                raise ValueError(
                    f"{type(model).__name__} cannot take windows of {length} tokens: more than its positions "
                    f"(max_position_embeddings): {error}"
                ) from error
            for window, row in zip(batch, logits, strict=True):
                total += float(cross_entropy(row[:-1].float(), window[1:]))
            done += len(batch)
            if on_window is not None:
                on_window(done)
    mean = total / len(windows)
    return math.inf if mean > 700 else math.exp(mean)

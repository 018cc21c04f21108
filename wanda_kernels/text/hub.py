"""Data sets of the Hugging Face hub, through the ``datasets`` library (extra ``[data]``)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from .._words import need

SHUFFLE_BUFFER = 10_000  # documents held at once while a stream is shuffled
INSTEAD = "without network, give a file: .txt, .jsonl or .safetensors to calibrate on, .txt to evaluate on"
C4_TRAIN = "en/c4-train.00000-of-01024.json.gz"


def load(name: str, split: str) -> Any:
    """``c4`` or ``wikitext2``, as the official code loads them.

    Raises:
        ImportError: without the ``datasets`` package.
        OSError: where the data set cannot be had.
    """
    if name == "c4":
        return _load(name, "allenai/c4", data_files={split: C4_TRAIN}, split=split)
    return _load(name, "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)


def stream(name: str, configuration: str | None, split: str, seed: int) -> Iterator[Any]:
    """The rows of any data set, shuffled by ``seed`` in a buffer, so that no more is read than is wanted.

    Raises: as :func:`load`.
    """
    rows = _load(name, name, configuration, split=split, streaming=True)
    try:
        yield from rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    except Exception as error:
        raise _unavailable(name, error) from error


def _load(name: str, *what: Any, **how: Any) -> Any:
    """Without a data set's own code: version 4 dropped it, earlier ones may be set to run it by the environment."""
    need("datasets", "data", f"{name} needs the datasets package")
    import datasets

    if "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters:
        how["trust_remote_code"] = False
    try:
        return datasets.load_dataset(*what, **how)
    except Exception as error:
        raise _unavailable(name, error) from error


def _unavailable(name: str, error: Exception) -> OSError:
    said = " ".join(str(error).split())[:300]
    return OSError(f"data set {name} could not be had from the Hugging Face hub: {said} ({INSTEAD})")

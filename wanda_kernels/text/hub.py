"""Data sets of the Hugging Face hub, through the ``datasets`` library (extra ``[data]``)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

SHUFFLE_BUFFER = 10_000  # documents held at once while a stream is shuffled
INSTEAD = "without network, pass a file: --calibration FILE (.txt, .jsonl or .safetensors), --text FILE.txt"
C4_TRAIN = "en/c4-train.00000-of-01024.json.gz"


def load(name: str, split: str) -> Any:
    """``c4`` or ``wikitext2``, as the official code loads them.

    Raises:
        ImportError: without the ``datasets`` package.
        OSError: where the data set cannot be had.
    """
    datasets = _library(name)
    try:
        if name == "c4":
            return datasets.load_dataset("allenai/c4", data_files={split: C4_TRAIN}, split=split)
        return datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    except Exception as error:
        raise _unavailable(name, error) from error


def stream(name: str, configuration: str | None, split: str, seed: int) -> Iterator[Any]:
    """The rows of any data set, shuffled by ``seed`` in a buffer, so that no more is read than is wanted.

    Raises: as :func:`load`.
    """
    datasets = _library(name)
    try:
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True)
        yield from rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    except Exception as error:
        raise _unavailable(name, error) from error


def _library(name: str) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f"{name} needs the datasets package: pip install 'wanda_kernels[data]'")
    import datasets

    return datasets


def _unavailable(name: str, error: Exception) -> OSError:
    said = " ".join(str(error).split())[:300]
    return OSError(f"data set {name} could not be had from the Hugging Face hub: {said} ({INSTEAD})")

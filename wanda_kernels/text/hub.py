"""The data sets that the paper uses, through the ``datasets`` library (extra ``[data]``)."""

from __future__ import annotations

import importlib.util
from typing import Any

C4_TRAIN = "en/c4-train.00000-of-01024.json.gz"


def load(name: str, split: str) -> Any:
    """``c4`` or ``wikitext2``, as the official code loads them.

    Raises:
        ImportError: without the ``datasets`` package.
        OSError: where the data set cannot be had.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f"{name} needs the datasets package: pip install 'wanda_kernels[data]'")
    import datasets

    try:
        if name == "c4":
            return datasets.load_dataset("allenai/c4", data_files={split: C4_TRAIN}, split=split)
        return datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    except Exception as error:
        raise OSError(
            f"data set {name} could not be had from the Hugging Face hub: {' '.join(str(error).split())[:300]}"
        ) from error

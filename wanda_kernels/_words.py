"""Figures, files and needs in words that say what is meant: percentages that do not round to lies, JSON that every
reader takes, which package is lacking."""

from __future__ import annotations

import importlib.util
import json
import math
from typing import Any


def percent(share: float, digits: int | None = None) -> str:
    """``0.999`` -> ``99.9%``.

    Args:
        share: 1 is all.
        digits: after the point; None: as many as it takes. Where rounding would make nothing or all of a share that is
            neither, as many more as it takes to tell.
    """
    value = 100 * share
    if digits is None:
        return f"{value:.10g}%"
    while digits < 10 and float(f"{value:.{digits}f}") in (0.0, 100.0) and share not in (0.0, 1.0):
        digits += 1
    return f"{value:.{digits}f}%"


def to_json(data: Any, indent: int | None = 2) -> str:
    """Strict JSON: a float that it has no number for is the string ``nan``, ``inf`` or ``-inf``, which ``float()``
    reads."""
    return json.dumps(_strict(data), indent=indent, allow_nan=False)


def _strict(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {key: _strict(value) for key, value in data.items()}
    return [_strict(value) for value in data] if isinstance(data, list | tuple) else data


def need(package: str, extra: str, why: str) -> None:
    """Raises ImportError, saying ``why``, where ``package`` of this package's ``extra`` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{why}: pip install 'wanda_kernels[{extra}]'")

"""What a results file may hold. It may have been edited, or come from somebody else: what is shown of it is checked
here, and a run's names are made anew from its options."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from .plan import Run

_LARGEST = 2**53  # whole numbers up to there are floats, too
_SETTINGS = ("model", "calibration", "text", "length", "windows", "dtype")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def read_results(path: Path) -> dict[str, Any]:
    """A results file: settings, circumstances, dense, and runs by their key.

    Raises:
        ValueError: it is not one, or a field is not what it has to be: with its name.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no regular file: choose another folder")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: data[name] for name in ("settings", "circumstances", "dense", "runs")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not the file of a study: choose another folder") from error
    where = str(path)
    runs = [checked_run(run, f"{where}, run {_short.repr(key)}") for key, run in _dict(parts["runs"], where, "runs")]
    return {
        "settings": _settings(parts["settings"], where),
        "circumstances": _circumstances(parts["circumstances"], where),
        "dense": _dense(parts["dense"], where),
        "runs": {run_of(run).key: run for run in runs},
    }


def checked(data: dict[str, Any]) -> dict[str, Any]:
    """The same of a study's results in memory, whose runs are a list."""
    where = "results"
    runs = data.get("runs")
    if not isinstance(runs, list):
        raise _wrong(where, "runs", "a list", runs)
    return {
        "settings": _settings(data.get("settings"), where),
        "circumstances": _circumstances(data.get("circumstances"), where),
        "dense": _dense(data.get("dense"), where),
        "runs": [checked_run(run, f"{where}, run {number}") for number, run in enumerate(runs)],
    }


def run_of(record: dict[str, Any]) -> Run:
    return Run(**{field.name: record[field.name] for field in fields(Run)})


def checked_run(record: Any, where: str) -> dict[str, Any]:
    """A run's record with its numbers as numbers, and its label and target as its options say."""
    found = dict(_dict(record, where, "it"))
    found |= {name: _field(found, name, where, kind) for name, kind in _FIELDS.items()}
    parts = _dict(found["parts"], where, "parts")
    found["parts"] = {str(name): _checked(value, _seconds, where, f"parts, {name}") for name, value in parts}
    if "layers" in found:
        if not isinstance(found["layers"], list):
            raise _wrong(where, "layers", "a list", found["layers"])
        found["layers"] = [_layer(layer, f"{where}, layer {number}") for number, layer in enumerate(found["layers"])]
    if found["sparsity"] is None and found["pattern"] is None:
        raise _wrong(where, "sparsity", "a number where there is no pattern", None)
    try:
        run = run_of(found)
        run.spec()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return found | {"label": run.label, "target": run.target}


def _layer(layer: Any, where: str) -> dict[str, Any]:
    found = dict(_dict(layer, where, "it"))
    return found | {name: _field(found, name, where, kind) for name, kind in _LAYER_FIELDS.items()}


def _settings(settings: Any, where: str) -> dict[str, Any]:
    found = dict(_dict(settings, where, "settings"))
    for name in _SETTINGS:
        _field(found, name, f"{where}, settings", _scalar)
    return found


def _dense(dense: Any, where: str) -> dict[str, Any] | None:
    if dense is None:
        return None
    found = dict(_dict(dense, where, "dense"))
    return found | {"perplexity": _field(found, "perplexity", f"{where}, dense", _perplexity)}


def _circumstances(sessions: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(sessions, list):
        raise _wrong(where, "circumstances", "a list", sessions)
    found = [dict(_dict(session, where, "circumstances")) for session in sessions]
    for session in found:
        for name, value in session.items():
            _checked(value, _or_none(_scalar), where, f"circumstances, {name}")
    return found


def _dict(value: Any, where: str, name: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, name, "an object", value)
    return value.items()


# A kind takes a value and returns what it stands for; it raises ValueError saying what is required.
Kind = Callable[[Any], Any]


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | int | float):
        raise ValueError("text or a number")
    return value


def _number(value: Any) -> float | int:
    """``nan``, ``inf`` and ``-inf`` are written as text, which JSON has no number for."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("a number")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError(f"a number of at most {_LARGEST}")
    return value


def _perplexity(value: Any) -> float | int:
    if _number(value) <= 0:
        raise ValueError("a number above 0")
    return _number(value)


def _seconds(value: Any) -> float | int:
    if not 0 <= _number(value) < math.inf:
        raise ValueError("a number, 0 or more")
    return _number(value)


def _share(value: Any) -> float | int:
    if not 0 <= _number(value) <= 1:
        raise ValueError("a number from 0 to 1")
    return _number(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise ValueError("a whole number, 0 or more")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
        raise ValueError("text of one line, up to 1,000 characters")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _or_none(kind: Kind) -> Kind:
    return lambda value: None if value is None else kind(value)


_FIELDS: dict[str, Kind] = {
    "method": _text, "sparsity": _or_none(_share), "pattern": _or_none(_text), "samples": _count, "seed": _whole,
    "group": _or_none(_text), "variant": _bool, "weight_update": _or_none(_bool), "owl": _bool, "detail": _bool,
    "perplexity": _perplexity, "achieved_sparsity": _share, "seconds": _seconds, "parts": lambda value: value,
    "peak_memory_bytes": _or_none(_whole), "damped": _count,
}  # fmt: skip
_LAYER_FIELDS: dict[str, Kind] = {
    "name": _text, "exact_error": _or_none(_number), "estimated_error": _or_none(_number),
    "threshold": _or_none(_number), "sparsity": _or_none(_share),
}  # fmt: skip


def _field(record: dict[str, Any], name: str, where: str, kind: Kind) -> Any:
    if name not in record:
        raise ValueError(f"{where} has no {name}")
    return _checked(record[name], kind, where, name)


def _checked(value: Any, kind: Kind, where: str, name: str) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        raise _wrong(where, name, str(error), value) from None


def _wrong(where: str, name: str, required: str, value: Any) -> ValueError:
    shown = name if name.isprintable() and len(name) < 80 else _short.repr(name)
    return ValueError(f"{where}: {shown} must be {required}, got {_short.repr(value)}")

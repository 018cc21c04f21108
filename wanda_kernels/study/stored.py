"""What a results file may hold. It may have been edited, or come from somebody else: what is shown of it is checked
here, and a run's names are made anew from its options."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .plan import Run

_LARGEST = 2**53  # whole numbers up to there are floats, too
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
        data = {name: data[name] for name in ("settings", "circumstances", "dense", "runs")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not the file of a study: choose another folder") from error
    runs = _checked(data["runs"], _object, str(path), "runs")
    found = _results(data, str(path), [(_short.repr(key), run) for key, run in runs.items()])
    return found | {"runs": {run_of(run).key: run for run in found["runs"]}}


def checked(data: dict[str, Any]) -> dict[str, Any]:
    """The same of a study's results in memory, whose runs are a list."""
    return _results(data, "results", enumerate(_checked(data.get("runs"), _list, "results", "runs")))


def _results(data: dict[str, Any], where: str, runs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    """``runs``: their names, for errors, and their records."""
    found_runs = [(f"{where}, run {name}", _checked_run(run, f"{where}, run {name}")) for name, run in runs]
    sessions = _checked(data.get("circumstances"), _list, where, "circumstances")
    for session in sessions:
        for name, value in _checked(session, _object, where, "circumstances").items():
            _checked(value, _or_none(_scalar), where, f"circumstances, {name}")
    settings = _record(data.get("settings"), where, _SETTINGS, "settings", ONE_TEXT)
    if len(settings["further_windows"]) != len(settings["further_texts"]):
        count = len(settings["further_texts"])
        raise _wrong(where, "settings, further_windows", f"{count} numbers, one a text", settings["further_windows"])
    dense = data.get("dense")
    if dense is not None:
        dense = _record(
            dense, where, {"perplexity": _perplexity, "further": _each(_perplexity)}, "dense", {"further": []}
        )
    for name, record in [*found_runs, *([] if dense is None else [(f"{where}, dense", dense)])]:
        if len(record["further"]) != len(settings["further_texts"]):
            required = f"{len(settings['further_texts'])} perplexities, one for each further text of the settings"
            raise _wrong(name, "further", required, record["further"])
    return {
        "settings": settings,
        "circumstances": [dict(session) for session in sessions],
        "dense": dense,
        "runs": [run for _, run in found_runs],
    }


def run_of(record: dict[str, Any]) -> Run:
    return Run(**{field.name: record[field.name] for field in fields(Run)})


def _checked_run(record: Any, where: str) -> dict[str, Any]:
    """A run's record with its numbers as numbers, and its label and target as its options say."""
    found = _record(record, where, _FIELDS, later=_LATER_FIELDS)
    parts = found["parts"].items()
    found["parts"] = {str(name): _checked(value, _seconds, where, f"parts, {name}") for name, value in parts}
    if "layers" in found:
        layers = enumerate(_checked(found["layers"], _list, where, "layers"))
        found["layers"] = [_record(layer, f"{where}, layer {number}", _LAYER_FIELDS) for number, layer in layers]
    if found["sparsity"] is None and found["pattern"] is None:
        raise _wrong(where, "sparsity", "a number where there is no pattern", None)
    try:
        run = run_of(found)
        run.spec()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return found | asdict(run) | {"label": run.label, "target": run.target}


def _record(
    record: Any, where: str, kinds: dict[str, Kind], name: str | None = None, later: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An object with its fields of ``kinds`` as what they stand for. ``name``: its own, in errors; ``later``: values of
    fields that files of earlier versions have not."""
    found = (later or {}) | dict(_checked(record, _object, where, name or "it"))
    inside = f"{where}, {name}" if name else where
    for field, kind in kinds.items():
        if field not in found:
            raise ValueError(f"{inside} has no {field}")
        found[field] = _checked(found[field], kind, inside, field)
    return found


def _checked(value: Any, kind: Kind, where: str, name: str) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        raise _wrong(where, name, str(error), value) from None


def _wrong(where: str, name: str, required: str, value: Any) -> ValueError:
    shown = name if name.isprintable() and len(name) < 80 else _short.repr(name)
    return ValueError(f"{where}: {shown} must be {required}, got {_short.repr(value)}")


# A kind takes a value and returns what it stands for; it raises ValueError saying what is required.
Kind = Callable[[Any], Any]


def _kind(required: str, accepts: Callable[[Any], bool], base: Kind = lambda value: value) -> Kind:
    """What is a ``base`` and then ``accepts`` what that makes of it."""

    def kind(value: Any) -> Any:
        found = base(value)
        if not accepts(found):
            raise ValueError(required)
        return found

    return kind


def _or_none(kind: Kind) -> Kind:
    return lambda value: None if value is None else kind(value)


def _each(kind: Kind) -> Kind:
    """A list, each of its values a ``kind``."""

    def kinds(value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("a list")
        try:
            return [kind(one) for one in value]
        except ValueError as error:
            raise ValueError(f"a list, each of it {error}") from None

    return kinds


def _is_a(value: Any, *types: type) -> bool:
    """JSON's true and false are no numbers."""
    return isinstance(value, types) and not isinstance(value, bool)


_object = _kind("an object", lambda value: isinstance(value, dict))
_list = _kind("a list", lambda value: isinstance(value, list))
_bool = _kind("true or false", lambda value: isinstance(value, bool))
_scalar = _kind("text or a number", lambda value: isinstance(value, str | int | float))
_text = _kind(
    "text of one line, up to 1,000 characters",
    lambda value: isinstance(value, str) and value.isprintable() and len(value) <= 1000,
)
_whole = _kind("a whole number", lambda value: _is_a(value, int))
_count = _kind("a whole number, 0 or more", lambda value: _is_a(value, int) and 0 <= value <= _LARGEST)
# nan, inf and -inf are written as text, which JSON has no number for
_real = _kind(
    "a number",
    lambda value: _is_a(value, int, float),
    lambda value: float(value) if value in ("nan", "inf", "-inf") else value,
)
_number = _kind(
    f"a number of at most {_LARGEST}", lambda value: isinstance(value, float) or abs(value) <= _LARGEST, _real
)
_perplexity = _kind("a number above 0", lambda value: not value <= 0, _number)
_seconds = _kind("a number, 0 or more", lambda value: 0 <= value < math.inf, _number)
_damping = _kind("a finite number, 0 or more", lambda value: 0 <= value < math.inf, _number)
_share = _kind("a number from 0 to 1", lambda value: 0 <= value <= 1, _number)

_FIELDS: dict[str, Kind] = {
    "method": _text, "sparsity": _or_none(_share), "pattern": _or_none(_text), "samples": _count, "seed": _whole,
    "group": _or_none(_text), "variant": _bool, "weight_update": _or_none(_bool), "owl": _bool, "detail": _bool,
    "perplexity": _perplexity, "achieved_sparsity": _share, "seconds": _seconds, "parts": _object,
    "peak_memory_bytes": _or_none(_whole), "damped": _count, "further": _each(_perplexity),
    "refine": _bool, "refine_damping": _or_none(_damping), "update": _bool, "update_damping": _or_none(_damping),
}  # fmt: skip
_LATER_FIELDS: dict[str, Any] = {
    "further": [], "refine": False, "refine_damping": None, "update": False, "update_damping": None,
}  # fmt: skip
_SETTINGS: dict[str, Kind] = {
    "model": _scalar, "calibration": _scalar, "text": _scalar, "length": _scalar, "windows": _scalar, "dtype": _scalar,
    "further_texts": _each(_scalar), "further_windows": _each(_count),
}  # fmt: skip
ONE_TEXT: dict[str, Any] = {"further_texts": [], "further_windows": []}
_LAYER_FIELDS: dict[str, Kind] = {
    "name": _text, "exact_error": _or_none(_number), "estimated_error": _or_none(_number),
    "threshold": _or_none(_number), "sparsity": _or_none(_share),
}  # fmt: skip

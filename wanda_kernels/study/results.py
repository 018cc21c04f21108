"""What a study has found so far: ``results.json``, written anew after each run, and ``results.csv``."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._words import to_json
from ..models.save import check_writable
from .plan import Run
from .stored import ONE_TEXT, read_results

COLUMNS = (
    "method", "sparsity", "pattern", "group", "variant", "weight_update", "owl", "refine", "refine_damping", "update",
    "update_damping", "samples", "seed", "perplexity", "achieved_sparsity", "seconds", "peak_memory_bytes",
)  # fmt: skip
FILES = ("results.json", "results.csv", "report.html")


def check_folder(folder: Path) -> None:
    """Raises OSError where a study cannot be written to ``folder``: call it before the long work."""
    if not folder.exists():
        check_writable(folder)
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"output folder {folder} is a file")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"output folder {folder} cannot be written: {error.strerror or error}") from error
    for name in FILES:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"output folder {folder}: its {name} is a folder: choose another")


def refuse_other_study(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The results that ``folder`` holds, or None.

    Raises:
        ValueError: they are of other ``settings``, or broken.
    """
    path = folder / "results.json"
    if not path.exists():
        return None
    found = read_results(path)
    for name, value in settings.items():
        there = found["settings"].get(name)
        if there != value:
            said = str(there) if str(there).isprintable() and len(str(there)) < 200 else repr(str(there)[:200])
            raise ValueError(
                f"{path} is of a study with {name.replace('_', ' ')} {said}, this one has {value}: "
                "choose another folder, or overwrite it"
            )
    return found


class Results:
    """Runs by their key.

    Args:
        folder: of the study. What it holds is gone on with.
        settings: model, calibration, text, length, windows, dtype, and further_texts with further_windows where there
            are more: what makes figures comparable.
        circumstances: device and versions of this session.

    Raises:
        ValueError: where ``folder`` holds a study with other settings, or a broken file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], circumstances: dict[str, Any]) -> None:
        self._path = folder / "results.json"
        new: dict[str, Any] = {"settings": settings, "circumstances": [], "dense": None, "runs": {}}
        self.data = (refuse_other_study(folder, settings) or new) | {"settings": ONE_TEXT | settings}
        if circumstances not in self.data["circumstances"][-1:]:
            self.data["circumstances"].append(circumstances)

    def __contains__(self, run: Run) -> bool:
        done = self.data["runs"].get(run.key)
        return done is not None and (not run.detail or "layers" in done)

    @property
    def runs(self) -> list[dict[str, Any]]:
        return list(self.data["runs"].values())

    def set_dense(self, dense: dict[str, Any]) -> None:
        self.data["dense"] = {"further": []} | dense
        self._write()

    def add(self, run: Run, outcome: dict[str, Any]) -> None:
        self.data["runs"][run.key] = asdict(run) | {"label": run.label, "target": run.target, "further": []} | outcome
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, to_json(self.data, indent=1) + "\n")
        table = io.StringIO()
        names = [f"perplexity on {text}" for text in self.data["settings"]["further_texts"]]
        writer = csv.DictWriter(table, [*COLUMNS, *names], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(run | dict(zip(names, run["further"], strict=True)) for run in self.runs)
        replace_file(self._path.with_suffix(".csv"), table.getvalue())


def replace_file(path: Path, text: str) -> None:
    """Whole or not at all. A link in the place of ``path``, or of what is written first, is replaced, not followed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a run that was killed
    with partial.open("x", encoding="utf-8", errors="replace") as file:  # names of files may be no Unicode
        file.write(text)
    os.replace(partial, path)

"""What a study has found so far: ``results.json``, written anew after each run, and ``results.csv``."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .plan import Run

COLUMNS = (
    "method", "sparsity", "pattern", "group", "variant", "weight_update", "owl", "samples", "seed",
    "perplexity", "achieved_sparsity", "seconds", "peak_memory_bytes",
)  # fmt: skip


class Results:
    """Runs by their key.

    Args:
        folder: of the study. What it holds is gone on with.
        settings: model, calibration, text, length, windows, dtype: what makes figures comparable.
        circumstances: device and versions of this session.

    Raises:
        ValueError: where ``folder`` holds a study with other settings, or a broken file.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], circumstances: dict[str, Any]) -> None:
        self._path = folder / "results.json"
        self.data: dict[str, Any] = {
            "settings": settings,
            "circumstances": [circumstances],
            "dense": None,
            "runs": {},
        }
        if not self._path.exists():
            return
        try:
            before = json.loads(self._path.read_text())
            there, sessions = before["settings"], before["circumstances"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self._path} is not the file of a study: choose another folder") from error
        for name, value in settings.items():
            if there.get(name) != value:
                raise ValueError(
                    f"{self._path} is of a study with {name} {there.get(name)}, this one has {value}: choose another "
                    "folder, or pass --overwrite"
                )
        self.data = before
        if sessions[-1] != circumstances:
            sessions.append(circumstances)

    def __contains__(self, run: Run) -> bool:
        done = self.data["runs"].get(run.key)
        return done is not None and (not run.detail or "layers" in done)

    @property
    def runs(self) -> list[dict[str, Any]]:
        return list(self.data["runs"].values())

    def set_dense(self, dense: dict[str, Any]) -> None:
        self.data["dense"] = dense
        self._write()

    def add(self, run: Run, outcome: dict[str, Any]) -> None:
        self.data["runs"][run.key] = asdict(run) | {"label": run.label, "target": run.target} | outcome
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _replace(self._path, json.dumps(self.data, indent=1) + "\n")
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.runs)
        _replace(self._path.with_suffix(".csv"), table.getvalue())


def _replace(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)

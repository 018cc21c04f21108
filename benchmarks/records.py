"""Result files: one CSV row per figure, with its circumstances; and the comparison of two of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.table import Table

KEY = (
    "suite", "operator", "shape", "tokens", "dtype", "backend", "threads", "implementation", "part", "size",
)  # fmt: skip
CIRCUMSTANCES = (
    "device_type", "device", "cores", "driver", "kernels", "torch", "transformers", "python", "commit", "date",
)  # fmt: skip
# ratio: median over the repetitions of time / the time of `ratio_to` in the same one. copy_ratio: time a byte as a
# multiple of what a copy takes a byte (copy_gb_per_s: read and written), in the same run. check: what the check of the
# result, before anything was timed, has found.
FIGURES = (
    "repeats", "median_ms", "p20_ms", "p80_ms", "bytes", "gb_per_s", "copy_gb_per_s", "copy_ratio", "ratio",
    "ratio_to", "peak_bytes", "check",
)  # fmt: skip
COLUMNS = (*KEY, *FIGURES, *CIRCUMSTANCES)

Row = dict[str, Any]


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(column, "")) for column in KEY)


def number(row: Row, column: str) -> float | None:
    """A figure, or None where the cell is empty."""
    text = row.get(column, "")
    return None if text in ("", None) else float(text)


@contextmanager
def writer(path: Path) -> Iterator[Any]:
    """A function that writes one row and flushes it. The file takes its name at the end: what was there stays until
    then, and an interrupted run leaves ``<path>.partial``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        yield row_writer(file)
    partial.replace(path)


def row_writer(file: TextIO) -> Any:
    out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    out.writeheader()

    def write(row: Row) -> None:
        out.writerow({name: _cell(value) for name, value in row.items()})
        file.flush()

    return write


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


def read(path: Path) -> list[Row]:
    """The rows of a result file, as text; a last one that was cut off is left out.

    Raises:
        FileNotFoundError, ValueError: it is not there, or no result file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"result file {path} does not exist")
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        missing = set(COLUMNS) - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{path} is no result file of the benchmarks: it lacks {', '.join(sorted(missing))}")
        return [row for row in rows if None not in row.values()]


def compare(before: Iterable[Row], after: Iterable[Row]) -> list[Row]:
    """Rows that both have, with ``ratio`` (after / before) and ``verdict``: ``slower`` or ``faster`` only where the
    spreads (p20 to p80) do not overlap."""
    old = {key_of(row): row for row in before}
    found = []
    for row in after:
        other = old.get(key_of(row))
        new_median = number(row, "median_ms")
        old_median = None if other is None else number(other, "median_ms")
        if other is None or new_median is None or not old_median:
            continue
        verdict = ""
        if (number(row, "p20_ms") or 0) > (number(other, "p80_ms") or 0):
            verdict = "slower"
        elif (number(row, "p80_ms") or 0) < (number(other, "p20_ms") or 0):
            verdict = "faster"
        found.append({**row, "before_ms": old_median, "after_ms": new_median, "ratio": new_median / old_median,
                      "verdict": verdict})  # fmt: skip
    return found


def draw_comparison(compared: list[Row]) -> Table:
    table = Table(title="time after / before; slower, faster: the spreads do not overlap", title_justify="left")
    for heading in ("operator", "shape", "tokens", "dtype", "threads", "implementation", "before ms", "after ms"):
        table.add_column(heading, justify="right" if heading.endswith("ms") else "left")
    table.add_column("ratio", justify="right")
    table.add_column("", justify="left")
    for row in compared:
        name = " ".join(part for part in (row["operator"], row["part"], row["size"]) if part)
        cells = [str(row[column]) for column in ("shape", "tokens", "dtype", "threads", "implementation")]
        figures = [f"{row['before_ms']:.3f}", f"{row['after_ms']:.3f}", f"{row['ratio']:.3f}"]
        table.add_row(name, *cells, *figures, row["verdict"])
    return table

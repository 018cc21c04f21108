"""Pictures of result files, as PNG in docs/pictures/<device>/: rooflines and scaling, which no table shows.

Each carries a digest of the rows it was drawn from, so that a picture of other rows is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from benchmarks.circumstances import ROOT
from benchmarks.harness import OURS
from benchmarks.records import Row, key_of, number
from benchmarks.suites import fitted_exponent
from benchmarks.tables import native

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = ROOT / "docs" / "pictures"
GREY = "#888a85"


def names(suite: str, rows: list[Row]) -> list[str]:
    """The pictures that a suite's rows give."""
    return [name for name, (_, picked) in _plans(suite, rows).items() if picked]


def digest(rows: list[Row]) -> str:
    text = "\n".join(",".join((*key_of(row), *(str(row[c]) for c in _FIGURES))) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


_FIGURES = ("median_ms", "gb_per_s", "copy_gb_per_s")


def out_of_date(device: str, suite: str, rows: list[Row]) -> list[str]:
    found = []
    for name, (_, picked) in _plans(suite, rows).items():
        path = FOLDER / device / f"{name}.png"
        if picked and not (path.exists() and digest(picked).encode() in path.read_bytes()):
            found.append(f"docs/pictures/{device}/{name}.png")
    return found


def draw(device: str, suite: str, rows: list[Row]) -> None:
    """All pictures of a suite."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, (plot, picked) in _plans(suite, rows).items():
        if not picked:
            continue
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        plot(axes, picked)
        axes.set_title(f"{picked[-1]['device']}, {picked[-1]['kernels'].split(';')[0]}", fontsize=9, loc="left")
        path = FOLDER / device / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Software": None, "Description": f"rows {digest(picked)}"})
        pyplot.close(figure)


def _plans(suite: str, rows: list[Row]) -> dict[str, tuple[Callable[[Axes, list[Row]], None], list[Row]]]:
    """Name -> how it is drawn, and of which rows (none: no picture)."""
    rows = native(rows)
    if suite == "scaling":
        return {"scaling": (_scaling, [row for row in rows if number(row, "median_ms")])}
    timed = [row for row in rows if row["implementation"] == OURS and number(row, "copy_ratio")]
    return {f"{suite}-roofline": (_roofline, [row for row in timed if number(row, "copy_gb_per_s")])}


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _roofline(axes: Axes, rows: list[Row]) -> None:
    """Memory moves are what these operators cost: achieved bandwidth against bytes, under the copy's own."""
    for label in dict.fromkeys((row["operator"], row["dtype"]) for row in rows):
        mine = [row for row in rows if (row["operator"], row["dtype"]) == label]
        moved, speeds = ([number(row, column) or 0.0 for row in mine] for column in ("bytes", "gb_per_s"))
        axes.scatter([size / 1e6 for size in moved], speeds, s=18, label=" ".join(label))
    copies = sorted((number(row, "bytes") or 0.0, number(row, "copy_gb_per_s") or 0.0) for row in rows)
    sizes, speeds = _columns(copies)
    axes.plot([size / 1e6 for size in sizes], speeds, color=GREY, linewidth=1, linestyle="--", label="copy, same run")
    _log_axis(axes)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("MB that must be moved")
    axes.set_ylabel("GB/s")
    axes.legend(fontsize=7, loc="lower right", ncols=2)


def _scaling(axes: Axes, rows: list[Row]) -> None:
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = sorted((float(row["size"]), number(row, "median_ms") or 0.0) for row in rows if row["part"] == part)
        sizes, times = _columns(mine)
        exponent = f", exponent {fitted_exponent(sizes, times):.2f}" if len(sizes) > 1 else ""
        operator = next(row["operator"] for row in rows if row["part"] == part)
        axes.plot(sizes, times, marker="o", markersize=3, linewidth=1, label=f"{operator}, {part}{exponent}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rows, columns, tokens, samples, blocks")
    axes.set_ylabel("ms")
    axes.legend(fontsize=7)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]

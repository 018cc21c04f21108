"""Pictures of result files, as SVG and PNG in docs/pictures/<device>/: ratio bars, a roofline, scaling.

Each SVG carries a digest of the rows it was drawn from, so that a picture of other rows is noticed.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.circumstances import ROOT
from benchmarks.harness import OURS
from benchmarks.records import Row, key_of, number
from benchmarks.suites import fitted_exponent
from benchmarks.tables import native

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = ROOT / "docs" / "pictures"
BLUE, GREY, RED = "#3465a4", "#888a85", "#a40000"


def names(suite: str, rows: list[Row]) -> list[str]:
    """The pictures that a suite's rows give."""
    return [name for name, (_, picked) in _plans(suite, rows).items() if picked]


def digest(rows: list[Row]) -> str:
    text = "\n".join(",".join((*key_of(row), *(str(row[c]) for c in _FIGURES))) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


_FIGURES = ("median_ms", "ratio", "gb_per_s", "copy_gb_per_s")


def out_of_date(device: str, suite: str, rows: list[Row]) -> list[str]:
    found = []
    for name, (_, picked) in _plans(suite, rows).items():
        path = FOLDER / device / f"{name}.svg"
        current = path.exists() and path.with_suffix(".png").exists() and digest(picked) in path.read_text()
        if picked and not current:
            found.append(f"docs/pictures/{device}/{name}.svg")
    return found


def draw(device: str, suite: str, rows: list[Row]) -> None:
    """All pictures of a suite."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "wanda_kernels"  # the same rows give the same file
    from matplotlib import pyplot

    for name, (plot, picked) in _plans(suite, rows).items():
        if not picked:
            continue
        figure, axes = pyplot.subplots(figsize=(8, max(3.0, plot.height(picked))), layout="constrained")
        plot.function(axes, picked)
        axes.set_title(f"{picked[-1]['device']}, {picked[-1]['kernels'].split(';')[0]}", fontsize=9, loc="left")
        path = FOLDER / device / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Description": f"rows {digest(picked)}"})
        figure.savefig(path.with_suffix(".png"), dpi=120, metadata={"Software": None})
        pyplot.close(figure)


class _Plot:
    def __init__(self, function: Callable[[Axes, list[Row]], None], lines: bool) -> None:
        self.function, self._lines = function, lines

    def height(self, rows: list[Row]) -> float:
        return 1.0 + 0.22 * len(_bars(rows)) if self._lines else 4.5


def _plans(suite: str, rows: list[Row]) -> dict[str, tuple[_Plot, list[Row]]]:
    """Name -> how it is drawn, and of which rows (none: no picture)."""
    rows = native(rows)
    if suite == "scaling":
        return {"scaling": (_Plot(_scaling, False), [row for row in rows if number(row, "median_ms")])}
    ratios = [row for row in rows if number(row, "ratio") and row["ratio_to"] == OURS]
    timed = [row for row in rows if row["implementation"] == OURS and number(row, "copy_ratio")]
    return {
        f"{suite}-ratios": (_Plot(_ratio_bars, True), ratios),
        f"{suite}-roofline": (_Plot(_roofline, False), [row for row in timed if number(row, "copy_gb_per_s")]),
    }


def _bars(rows: list[Row]) -> dict[str, list[float]]:
    """A bar for each operator, dtype and peer (and batch and threads, where there are some): over the shapes."""
    found: dict[str, list[float]] = {}
    for row in rows:
        about = [row["operator"], row["dtype"]]
        about += [f"batch {row['tokens']}, {row['threads'] or 1} thr."] if row["tokens"] else []
        found.setdefault(f"{' '.join(about)}: {row['implementation']}", []).append(number(row, "ratio") or 0.0)
    return found


def _ratio_bars(axes: Axes, rows: list[Row]) -> None:
    bars = _bars(rows)
    middle = [statistics.median(values) for values in bars.values()]
    spread: Any = [
        [mid - min(values) for mid, values in zip(middle, bars.values(), strict=True)],
        [max(values) - mid for mid, values in zip(middle, bars.values(), strict=True)],
    ]
    colours = [BLUE if value >= 1 else RED for value in middle]
    widths = [value - 1 for value in middle]
    axes.barh(list(bars), widths, left=1, xerr=spread, color=colours, height=0.7, error_kw={"ecolor": GREY})
    axes.axvline(1, color="black", linewidth=0.8)
    _log_axis(axes)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("time of the peer / ours; median over shapes, whiskers: all of them", fontsize=9)


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

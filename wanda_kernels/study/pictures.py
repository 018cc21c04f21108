"""A study's pictures as inline SVG: text and lines in the page's own colour, for a light and a dark page."""

from __future__ import annotations

import io
import itertools
import math
import re
import statistics
from collections.abc import Callable
from html import escape
from typing import Any

from .._words import need
from ..methods import METHODS
from ..pruning.spec import REFINE_DAMPING, UPDATE_DAMPING
from . import tables

Row = dict[str, Any]
_INK = "#010203"  # stands for the page's text colour until the SVG is written
# Told apart on white and on near-black, and by most colour-blind people; markers and line styles differ as well.
STYLES = (
    ("#8a8a8a", "^"), ("#d9822b", "s"), ("#3d85d8", "o"), ("#2f9e6e", "D"), ("#9b6dc6", "v"), ("#c0504d", "P"),
)  # fmt: skip
WIDTH, HEIGHT = 7.2, 3.6


def check_library() -> None:
    """Raises ImportError without matplotlib: call it before the long work."""
    need("matplotlib", "plot", "the pictures of a study need matplotlib")


def _draw(name: str, title: str, paint: Callable[[Any, Any], None], height: float = HEIGHT, panels: int = 1) -> str:
    """``paint`` is given the figure and its axes: of several ``panels`` side by side, an array."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "text.parse_math": False,  # a name with $ is a name
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.patch.set_alpha(0)
        if panels == 1:
            paint(figure, figure.subplots())
        else:
            paint(figure, figure.subplots(1, panels))
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    wanted = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    # ids that nothing refers to would repeat in the page
    svg = re.sub(r" id=\"([^\"]*)\"", lambda match: match[0] if match[1] in wanted else "", svg)
    # lines and digits that no eye sees are four fifths of a picture
    svg = re.sub(r" d=\"[^\"]*\"", lambda match: re.sub(r"(\.\d)\d+", r"\1", match[0]), re.sub(r"\s*\n\s*", " ", svg))
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)


def styles() -> dict[str, tuple[str, str]]:
    """Method -> colour and marker, for all but the paper's ablations, which have a table."""
    shown = [name for name in tables.order() if not METHODS[name].update]
    return dict(zip(shown, itertools.cycle(STYLES), strict=False))


def bars(data: Row) -> str | None:
    """Perplexity by method and pattern, on a logarithmic axis, with the dense model as a line."""
    plain = [run for run in tables.at_base(data["runs"]) if tables.is_plain(run) and run["method"] in styles()]
    runs = [run for run in plain if _can_be_drawn(run["perplexity"])]
    targets = [target for target in tables.PATTERNS if any(run["target"] == target for run in runs)]
    methods = [method for method in styles() if any(run["method"] == method for run in runs)]
    if not targets:
        return None

    def paint(_figure: Any, axes: Any) -> None:
        width = 0.8 / len(methods)
        for number, method in enumerate(methods):
            found = [(i, tables.lookup(runs, method=method, target=target)) for i, target in enumerate(targets)]
            shown = [(i, value) for i, value in found if value is not None]
            places = [i + (number - (len(methods) - 1) / 2) * width for i, _ in shown]
            heights = [value for _, value in shown]
            drawn = axes.bar(places, heights, width * 0.92, color=styles()[method][0], label=method)
            axes.bar_label(drawn, [tables.figure(value) for value in heights], padding=2, fontsize=8, color=_INK)
        _perplexity_axis(axes, data)
        axes.set_xticks(range(len(targets)), targets)
        axes.set_xlabel("pattern")
        axes.margins(y=0.12)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)

    return _draw("bars", "Perplexity by method and pattern", paint)


def _can_be_drawn(perplexity: float) -> bool:
    """An axis with more powers of ten than this has no end that is a float."""
    return 1e-99 < perplexity < 1e99


def _perplexity_axis(axes: Any, data: Row, text: int = 0) -> None:
    """Logarithmic, labelled by plain numbers, with the dense model as a line. ``text``: which of the study's."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.set_ylabel("perplexity (log)")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}") if high < 10 * low else NullFormatter())
    dense = tables.perplexities(data["dense"])[text] if data["dense"] else None
    if dense is not None and _can_be_drawn(dense):
        axes.axhline(dense, color=_INK, linewidth=1, linestyle="--", label="dense")


def _curves(data: Row, runs: list[Row], along: str, label: str, name: str, title: str, log_x: bool) -> str | None:
    lines = {}
    for method in styles():
        of_method = [run for run in runs if run["method"] == method and run[along]]
        points = sorted({(r[along], r["perplexity"]) for r in of_method if _can_be_drawn(r["perplexity"])})
        if len(points) > 1:
            lines[method] = points
    if not lines:
        return None

    def paint(_figure: Any, axes: Any) -> None:
        for method, points in lines.items():
            x, y = zip(*points, strict=True)
            colour, marker = styles()[method]
            axes.plot(x, y, color=colour, marker=marker, label=method)
        _perplexity_axis(axes, data)
        if log_x:
            axes.set_xscale("log", base=2)
            ticks = sorted({point[0] for points in lines.values() for point in points})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlabel(label)
        axes.grid(axis="y", which="both", alpha=0.25)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)

    return _draw(name, title, paint)


def sparsity_curves(data: Row) -> str | None:
    runs = [run for run in tables.at_base(data["runs"]) if tables.is_plain(run) and run["pattern"] is None]
    return _curves(data, runs, "sparsity", "sparsity", "sparsity", "Perplexity by sparsity", False)


def calibration_curves(data: Row) -> str | None:
    runs = [run for run in tables.first_seed(data["runs"]) if tables.is_plain(run) and run["sparsity"] == 0.5]
    title = "Perplexity by number of calibration samples"
    return _curves(data, runs, "samples", "calibration samples (log)", "calibration", title, True)


def _means(runs: list[Row]) -> list[float]:
    """Of the perplexity on each text, over the runs."""
    return [statistics.mean(values) for values in zip(*map(tables.perplexities, runs), strict=True)]


def _shown_label(label: str) -> str:
    """A file's name may hold what no picture can."""
    label = "".join(letter if letter.isprintable() else " " for letter in label)
    return label if len(label) <= 40 else f"{label[:40]} .."


def _strength(run: Row) -> float:
    """Of a method's colour: the paler, the more is done after its mask."""
    return (1.0, 0.65, 0.35)[run["refine"] + run["update"]]


def text_bars(data: Row) -> str | None:
    """Perplexity by method and pattern, means over the seeds, on each text in a panel of its own."""
    texts = tables.texts(data)
    samples = tables.base_samples(data["runs"])
    shown = [
        run
        for run in data["runs"]
        if run["method"] in styles()
        and tables.is_by_itself(run)
        and run["samples"] in (0, samples)
        and run["refine_damping"] in (None, REFINE_DAMPING)
        and run["update_damping"] in (None, UPDATE_DAMPING)
        and all(map(_can_be_drawn, tables.perplexities(run)))
    ]
    found = {key: _means(runs) for key, runs in tables.by_label(shown).items()}
    labels = list(dict.fromkeys(label for label, _ in found))
    targets = list(dict.fromkeys(target for _, target in found))
    if len(texts) == 1 or not found:
        return None
    looks = {run["label"]: {"color": styles()[run["method"]][0], "alpha": _strength(run)} for run in shown}

    def paint(figure: Any, panels: Any) -> None:
        width = 0.8 / len(labels)
        for number, (axes, text) in enumerate(zip(panels, texts, strict=True)):
            for place, label in enumerate(labels):
                have = [
                    (i, found[label, target][number]) for i, target in enumerate(targets) if (label, target) in found
                ]
                places = [i + (place - (len(labels) - 1) / 2) * width for i, _ in have]
                axes.bar(places, [value for _, value in have], width * 0.92, label=label, **looks[label])
            _perplexity_axis(axes, data, number)
            axes.set_xticks(range(len(targets)), targets)
            axes.set_title(_shown_label(text), fontsize=10)
        handles, named = panels[0].get_legend_handles_labels()
        figure.legend(handles, named, loc="outside lower center", ncols=2)

    return _draw("texts", "Perplexity on each text", paint, panels=len(texts))


def damping_curves(data: Row, target: str) -> str | None:
    """Perplexity of refined masks against the damping, means over the seeds, on each text in a panel of its own; the
    method without refinement is a line."""
    texts = tables.texts(data)
    samples = tables.base_samples(data["runs"])
    runs = [
        run
        for run in data["runs"]
        if tables.is_by_itself(run) and run["target"] == target and run["method"] in styles()
        and run["samples"] in (0, samples) and all(map(_can_be_drawn, tables.perplexities(run)))
    ]  # fmt: skip
    lines: dict[tuple[str, bool, float | None], dict[float, list[Row]]] = {}
    for run in runs:
        if run["refine"]:
            line = lines.setdefault((run["method"], run["update"], run["update_damping"]), {})
            line.setdefault(run["refine_damping"], []).append(run)
    lines = {key: points for key, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    dampings = sorted({damping for points in lines.values() for damping in points})

    def paint(figure: Any, panels: Any) -> None:
        for number, axes in enumerate([panels] if len(texts) == 1 else panels):
            for (method, update, update_damping), points in lines.items():
                colour, marker = styles()[method]
                label = f"{method}, refined" + (" and updated" if update else "")
                label += "" if update_damping in (None, UPDATE_DAMPING) else f" (damping {update_damping!r})"
                values = [(dampings.index(d), _means(found)[number]) for d, found in sorted(points.items())]
                axes.plot(*zip(*values, strict=True), color=colour, marker=marker, label=label,
                          linestyle="-" if update else ":")  # fmt: skip
                plain = [run for run in runs if run["method"] == method and tables.is_plain(run)]
                if plain and not update:
                    axes.axhline(_means(plain)[number], color=colour, linewidth=1, alpha=0.6, label=method)
            _perplexity_axis(axes, data, number)
            axes.set_xticks(range(len(dampings)), [f"{damping:g}" for damping in dampings])
            axes.set_xlabel("damping")
            axes.set_title(_shown_label(texts[number]), fontsize=10)
        handles, named = figure.axes[0].get_legend_handles_labels()
        by_name = dict(zip(named, handles, strict=True))
        figure.legend(by_name.values(), by_name, loc="outside lower center", ncols=2)

    return _draw(f"damping-{target}", f"Perplexity against the damping of refined masks, {target}", paint,
                 panels=len(texts))  # fmt: skip


def heat_map(run: Row, what: str) -> str | None:
    """``what`` of each layer: blocks along, kinds of layer up."""
    places = []
    for layer in run.get("layers", []):
        number = re.search(r"(?:^|\.)([0-9]{1,6})\.", layer["name"])
        if number and layer[what] is not None and math.isfinite(layer[what]):
            kind: str = layer["name"].rsplit(".", 1)[-1]
            places.append((int(number[1]), kind if len(kind) <= 40 else f"{kind[:40]} ..", layer[what]))
    if not places:
        return None
    kinds = list(dict.fromkeys(kind for _, kind, _ in places))
    blocks = sorted({block for block, _, _ in places})
    values = [[float("nan")] * len(blocks) for _ in kinds]
    for block, kind, value in places:
        values[kinds.index(kind)][blocks.index(block)] = value

    def paint(figure: Any, axes: Any) -> None:
        mesh = axes.pcolormesh(values, cmap="viridis", edgecolors="none")
        axes.set_yticks([i + 0.5 for i in range(len(kinds))], kinds)
        step = max(1, len(blocks) // 10)
        axes.set_xticks([i + 0.5 for i in range(0, len(blocks), step)], [str(b) for b in blocks[::step]])
        axes.invert_yaxis()
        axes.set_xlabel("block")
        bar = figure.colorbar(mesh, ax=axes)
        bar.set_label(what.replace("_", " "))
        bar.outline.set_edgecolor(_INK)

    title = f"{what.replace('_', ' ')} of each layer, {run['label']} {run['target']}"
    return _draw(f"{what}-{run['label']}", title, paint, height=0.9 + 0.27 * len(kinds))


def cost_bars(data: Row) -> str | None:
    """Seconds of pruning at 50 %, by part."""
    runs = [run for run in tables.at_base(data["runs"]) if run["target"] == "50%" and not run["group"]]
    if not runs:
        return None
    colours = ("#3d85d8", "#d9822b", "#2f9e6e", "#9b6dc6", "#c0504d")
    parts = dict(zip(tables.parts_of(runs), colours, strict=False))

    def paint(_figure: Any, axes: Any) -> None:
        left = [0.0] * len(runs)
        for part, colour in parts.items():
            seconds = [run["parts"].get(part, 0.0) for run in runs]
            axes.barh(range(len(runs)), seconds, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        axes.set_yticks(range(len(runs)), [run["label"] for run in runs])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)

    return _draw("cost", "Seconds of pruning by part", paint, height=1.2 + 0.3 * len(runs))


def all_pictures(data: Row) -> dict[str, list[tuple[str, str]]]:
    """Section -> (caption, SVG) of each picture that there are figures for."""
    detailed = [run for run in data["runs"] if run.get("layers")]
    found: dict[str, list[tuple[str, str | None]]] = {
        "perplexity": [("Perplexity by method and pattern.", bars(data))],
        "texts": [("Perplexity on each text, means over the seeds.", text_bars(data))],
        "damping": [
            (
                f"Refined masks at {target}: damping against perplexity, means over the seeds.",
                damping_curves(data, target),
            )
            for target in dict.fromkeys(run["target"] for run in data["runs"] if run["refine"])
        ],
        "sparsity": [("Sparsity against perplexity.", sparsity_curves(data))],
        "calibration": [("Robustness to the number of calibration samples, at 50 %.", calibration_curves(data))],
        "cost": [("Seconds of pruning at 50 %, by part.", cost_bars(data))],
        "layers": [
            (f"{title}: {run['label']} {run['target']}.", heat_map(run, what))
            for run in detailed
            for what, title in (
                ("exact_error", "Relative output error of each layer on the calibration data"),
                ("threshold", "Largest pruned Wanda score, mean over rows"),
            )
        ],
    }
    return {name: [(text, svg) for text, svg in some if svg is not None] for name, some in found.items()}
